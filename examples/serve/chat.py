"""Ask a server about a picture, a sound or a clip, with OpenAI's client: the answer appears as it is made.

    python examples/serve/chat.py "what is it?" --file cat.png [--url http://127.0.0.1:8000/v1] [--key KEY]

Needs `pip install openai` and nothing else of this repository. Files stand before the question, in the order given.
"""

import argparse
import base64
import mimetypes
import os
from pathlib import Path
from typing import Any

from openai import OpenAI


def content_part(path: Path) -> dict[str, Any]:
    """A file as a part of a message: its bytes in a data: URL."""
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    name = {"image": "image_url", "audio": "audio_url", "video": "video_url"}.get(kind.partition("/")[0])
    if name is None:
        raise SystemExit(f"error: {path}: its name says neither picture nor sound nor video")
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": name, name: {"url": f"data:{kind};base64,{data}"}}


def main() -> None:
    """Ask, and print what comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--file", type=Path, action="append", default=[])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default=os.environ.get("OMNI_API_KEY", "none"))
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key=options.key)
    model = client.models.list().data[0].id
    content = [*(content_part(path) for path in options.file), {"type": "text", "text": options.question}]
    stream: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        temperature=0,
        max_completion_tokens=options.max_tokens,
        stream=True,
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
