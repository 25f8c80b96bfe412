"""The model ``megatron_omni`` of lmms-eval: every request goes to a server of ours (``megatron-omni serve``) by OpenAI's API.

``body`` makes the requests, ``asking`` sends them, ``local_server`` starts a server, ``model`` is what lmms-eval calls.
Only ``model`` and ``manifest`` need lmms-eval.
"""
