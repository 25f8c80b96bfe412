"""An OpenAI-compatible server and its page: HTTP in a process of its own, the engine in the processes of the model.

    client --HTTP--> http.py, app.py --link.py--> leader.py: generation's engine on rank 0, the other ranks follow it
                       |  connection.py  clients that are too slow are cut off
                       |  schema.py      what a request may say
                       |  media.py       media from data: URLs, or from allowed hosts
                       |  builders.py    processes that decode media and make prompts (building.py)
                       '  answers.py     events of the engine as the bodies and streams that clients expect

The package needs the extra ``[serve]``. torch is imported in the engine's and the builders' processes, never in the one
that speaks HTTP.
"""
