"""Serve a trained checkpoint: OpenAI's API over HTTP, and a page to talk to it.

    megatron-omni serve CHECKPOINT --port 8000
    megatron-omni serve CHECKPOINT --speaker SPEECH_CHECKPOINT --codec FOLDER
    torchrun --nproc-per-node 2 -m megatron_omni.cli.serve CHECKPOINT parallel.tensor_model_parallel_size=2

Rank 0 speaks HTTP. Text, pictures, sound and video in, text out, with a speaker (a process of its own) sound, and pictures of
a model that draws (another one). A
CHECKPOINT that is a speech generator itself is served alone. docs/serving.md has the paths and their limits. The
server listens on this machine only unless --host says otherwise, which needs a key (--api-key-file, or OMNI_API_KEY in
the environment) or --no-auth. SIGTERM ends it when the running answers have ended, with status 0; status 2 for bad input,
1 when the model's processes have ended. torch is imported after the command line has been accepted and the port is open.
"""

import argparse
import gc
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_omni.cli.generate import OVERRIDES, add_media_separator
from megatron_omni.cli.starting import Parser, refused, say_starting
from megatron_omni.config.outcome import EXIT_FAILURE
from megatron_omni.serve.settings import Settings

if TYPE_CHECKING:
    from megatron_omni.config.run import Recipe

KEY_VARIABLE = "OMNI_API_KEY"
NEEDED = ("h11", "prometheus_client", "pydantic", "starlette", "uvicorn")
ENGINE_LIMITS = ("max_running", "max_batch_tokens", "cache_tokens", "prefix_cache", "deterministic")
_ABOVE_ZERO = (
    "max_body_mib", "max_media", "max_waiting", "max_waiting_mib", "max_queue_seconds", "max_request_seconds",
    "patience_seconds", "builders", "max_speaking", "max_drawing",
    "max_new_tokens", "max_running", "max_batch_tokens", "cache_tokens",
)  # fmt: skip
SEND_BYTES = 128 << 10
_LOCAL = ("127.0.0.1", "::1", "localhost")
_RECIPE = "run_config.yaml"
"""Of a checkpoint (checkpoint/distributed.py, which imports torch)."""
_HTTP_END_SECONDS = 15.0
"""For last words to clients."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command line, checked as far as that goes without the checkpoint."""

    checkpoint: Path
    host: str
    port: int
    grace_seconds: float
    settings: Settings
    limits: dict[str, Any]
    """Of the engine."""
    overrides: list[str]
    speaker: tuple[str, str, str] | None
    """What the process that makes sound is told: checkpoint, codec, pieces at a time."""
    only_speaks: bool
    """The checkpoint is the speaker's."""
    painter: tuple[str, str, str] | None = None
    """What the process that draws is told: checkpoint, codec of pictures, pictures at a time."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="megatron-omni serve",
        description="Serve a trained checkpoint: OpenAI's API over HTTP, and a page to talk to it.",
        epilog="The sizes of the layout default to 1 whatever the checkpoint was trained on; what is left of the world "
        "size are further replicas, which share the requests.",
    )
    p.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/iter_* directories")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    p.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    p.add_argument("--model-name", metavar="NAME", help="the model's name in requests (default: of the run directory)")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"keys, one a line (or {KEY_VARIABLE})")
    p.add_argument("--no-auth", action="store_true", help="listen at --host without a key")
    p.add_argument("--allowed-hosts", type=_names, default=(), metavar="NAME,NAME",
                   help="names that a browser may use for a server without keys, beside localhost and addresses")  # fmt: skip
    p.add_argument("--media-domains", type=_names, default=(), metavar="NAME,NAME",
                   help="hosts that media may be fetched from (default: none, only data: URLs)")  # fmt: skip
    add_media_separator(p)
    p.add_argument("--ignore-unknown-fields", action="store_true", help="drop what is not known in requests")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer whose request does not say")
    p.add_argument("--max-body-mib", type=int, default=32, metavar="N", help="largest request (default 32)")
    p.add_argument("--max-media", type=int, default=16, metavar="N", help="media of one request (default 16)")
    p.add_argument("--max-waiting", type=int, default=256, metavar="N",
                   help="requests without a token, beyond which 429 is answered (default 256)")  # fmt: skip
    p.add_argument("--max-waiting-mib", type=int, default=2048, metavar="N",
                   help="of all requests in memory (default 2048)")  # fmt: skip
    p.add_argument("--max-queue-seconds", type=float, default=60.0, metavar="S", help="to the first token (default 60)")
    p.add_argument("--max-request-seconds", type=float, default=600.0, metavar="S", help="to the last (default 600)")
    p.add_argument("--patience-seconds", type=float, default=30.0, metavar="S", help="for a client to send the head of a "
                   "request, to begin its body, to take what was sent (default 30)")  # fmt: skip
    p.add_argument("--chunk-ms", type=float, default=10.0, metavar="MS", help="tokens that come within it are one chunk of a "
                   "stream (default 10; 0: each token is one)")  # fmt: skip
    p.add_argument("--max-running", type=int, metavar="N", help="answers that are computed together (default 32)")
    p.add_argument("--max-batch-tokens", type=int, metavar="N", help="tokens of a step of the engine (default 512)")
    p.add_argument("--cache-tokens", type=int, metavar="N", help="positions of the cache of keys and values")
    p.add_argument(
        "--prefix-cache", action="store_true", help="keep keys and values of prompts for those that begin alike"
    )
    p.add_argument("--deterministic", action="store_true", help="bits of an answer do not depend on others (slow)")
    p.add_argument("--speaker", type=Path, metavar="DIR", help="run directory or checkpoint of a speech generator, which "
                   "speaks the answers (docs/speech.md)")  # fmt: skip
    p.add_argument("--codec", type=Path, metavar="DIR", help="folder of its codec (default: the one that it names)")
    p.add_argument("--max-speaking", type=int, default=8, metavar="N", help="pieces of speech that are computed together "
                   "(default 8)")  # fmt: skip
    p.add_argument("--no-pictures", action="store_true", help="of a model that draws: answer with text alone")
    p.add_argument(
        "--vae", type=Path, metavar="DIR", help="folder of the codec of pictures (default: that of the recipe)"
    )
    p.add_argument(
        "--max-drawing", type=int, default=4, metavar="N", help="pictures that are drawn together (default 4)"
    )
    p.add_argument("--builders", type=int, default=2, metavar="N", help="processes that decode media (default 2)")
    p.add_argument("--grace-seconds", type=float, default=30.0, metavar="S",
                   help="for running answers after SIGTERM (default 30)")  # fmt: skip
    p.add_argument("--ssl-certfile", metavar="FILE", help="serve https; browsers give the microphone to no other page "
                   "that is not on their own machine")  # fmt: skip
    p.add_argument("--ssl-keyfile", metavar="FILE")
    p.add_argument("overrides", nargs="*", metavar="key=value", help=f"one of {', '.join(OVERRIDES)}")
    return p


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def parse(argv: Sequence[str] | None = None) -> Command:
    """The checked command line. ValueError names what is wrong."""
    args = parser().parse_intermixed_args(argv)
    for name in _ABOVE_ZERO:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port is {args.port}; it must be from 0 to 65535")
    if args.grace_seconds < 0:
        raise ValueError(f"--grace-seconds is {args.grace_seconds:g}; it must be 0 or more")
    if not 0 <= args.chunk_ms <= 1000:
        raise ValueError(f"--chunk-ms is {args.chunk_ms:g}; it must be from 0 to 1000")
    if (args.ssl_certfile is None) != (args.ssl_keyfile is None):
        raise ValueError("--ssl-certfile and --ssl-keyfile belong together: give both")
    for file in filter(None, (args.ssl_certfile, args.ssl_keyfile)):
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
    for override in args.overrides:
        if override.partition("=")[0] not in OVERRIDES:
            raise ValueError(f"override {override!r}: serving knows {', '.join(OVERRIDES)}")
    if not args.checkpoint.is_dir():
        raise ValueError(f"{args.checkpoint}: no such checkpoint directory")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{', '.join(missing)} cannot be imported; install the extra: pip install 'megatron-omni[serve]'"
        )
    only_speaks = _is_speech_generator(args.checkpoint)
    speaker, painter = _speaker(args, only_speaks), _painter(args)
    keys = _keys(args.api_key_file)
    if args.host not in _LOCAL and not keys and not args.no_auth:
        raise ValueError(
            f"--host {args.host} lets other machines in without a key: give --api-key-file, set {KEY_VARIABLE}, or say "
            "--no-auth"
        )
    settings = Settings(
        name=args.model_name or _run_name(args.checkpoint),
        api_keys=keys,
        allowed_hosts=args.allowed_hosts,
        media_domains=args.media_domains,
        media_separator=args.media_separator,
        ignore_unknown_fields=args.ignore_unknown_fields,
        max_new_tokens=args.max_new_tokens,
        max_body_bytes=args.max_body_mib << 20,
        max_media=args.max_media,
        max_waiting=args.max_waiting,
        max_waiting_bytes=args.max_waiting_mib << 20,
        queue_seconds=args.max_queue_seconds,
        request_seconds=args.max_request_seconds,
        patience_seconds=args.patience_seconds,
        chunk_seconds=args.chunk_ms / 1000,
        speaks=speaker is not None,
        draws=painter is not None,
        builders=args.builders,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
    )
    limits = {name: getattr(args, name) for name in ENGINE_LIMITS if getattr(args, name) is not None}
    if args.max_running is not None:  # every running answer may take two tokens of a step
        limits.setdefault("max_batch_tokens", max(512, 2 * args.max_running))
    return Command(
        checkpoint=args.checkpoint, host=args.host, port=args.port, grace_seconds=args.grace_seconds,
        settings=settings, limits=limits, overrides=args.overrides, speaker=speaker, only_speaks=only_speaks,
        painter=painter,
    )  # fmt: skip


def _speaker(args: argparse.Namespace, only_speaks: bool) -> tuple[str, str, str] | None:
    """Of the process that makes sound; ValueError for what does not go together."""
    if only_speaks and args.speaker is not None:
        raise ValueError(
            f"{args.checkpoint} is a speech generator itself: leave --speaker out, or serve a language model"
        )
    if only_speaks and (args.overrides or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise ValueError(
            f"{args.checkpoint} is a speech generator, which a server speaks on one rank of its own: leave out torchrun and "
            "overrides; several servers share listeners, and megatron-omni speak --jsonl uses all ranks"
        )
    if args.codec is not None and not (only_speaks or args.speaker is not None):
        raise ValueError("--codec is that of a speech generator: give --speaker too")
    for folder in filter(None, (args.speaker, args.codec)):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such directory")
    if not only_speaks and args.speaker is None:
        return None
    if not only_speaks and not _is_speech_generator(args.speaker):
        raise ValueError(f"{args.speaker}: no speech generator's checkpoint is there (a recipe with model.speech)")
    codec = str(args.codec) if args.codec is not None else ""
    return str(args.checkpoint if only_speaks else args.speaker), codec, str(args.max_speaking)


def _painter(args: argparse.Namespace) -> tuple[str, str, str] | None:
    """Of the process that draws, where the model does; ValueError for what does not go together."""
    recipe = _recipe_of(args.checkpoint)
    image = recipe.model.image if recipe is not None else None
    if args.no_pictures and args.vae is not None:
        raise ValueError("--vae is for pictures: leave it out, or --no-pictures")
    if image is None and (args.no_pictures or args.vae is not None):
        raise ValueError(f"{args.checkpoint} draws nothing (model.image is null): leave out --no-pictures and --vae")
    if image is None or args.no_pictures:
        return None
    if args.vae is None and image.vae is None:
        raise ValueError(
            f"{args.checkpoint} names no codec of pictures (model.image.vae is null): give its folder with --vae, or --no-pictures"
        )
    if args.vae is not None and not args.vae.is_dir():
        raise ValueError(f"{args.vae}: no such directory")
    return str(args.checkpoint), str(args.vae) if args.vae is not None else "", str(args.max_drawing)


def _is_speech_generator(checkpoint: Path) -> bool:
    """Whether it has a ``model.speech``."""
    recipe = _recipe_of(checkpoint)
    return recipe is not None and recipe.model.speech is not None


def _recipe_of(checkpoint: Path) -> "Recipe | None":
    """The recipe beside its weights; None for what is no recipe, which is refused when it is opened."""
    from megatron_omni.config.load import load_recipe

    found = [checkpoint / _RECIPE, *sorted(checkpoint.glob(f"checkpoints/iter_*/{_RECIPE}"))[-1:]]
    for file in found:
        if file.is_file():
            try:
                return load_recipe(file)
            except ValueError:
                return None
    return None


def _keys(file: Path | None) -> tuple[str, ...]:
    """Of the file, or of the environment."""
    if file is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
    else:
        from megatron_omni.foreign import read_text

        text, where = read_text(file, most_bytes=1 << 20), str(file)
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not keys:
        raise ValueError(f"{where}: holds no key; write one a line")
    for key in keys:
        if not re.fullmatch(r"[!-~]{8,512}", key):
            raise ValueError(f"{where}: a key needs 8 to 512 visible ASCII characters")
    return keys


def _run_name(checkpoint: Path) -> str:
    """Of the run that a directory belongs to: ``runs/quickstart/checkpoints/iter_0000100`` is of ``quickstart``."""
    where = checkpoint.resolve()
    parts = where.parts
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else where.name


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ValueError where the port is taken or the address is none of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # Of each connection; the kernel would let megabytes wait for a client that does not read.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        return listening
    except OSError as error:
        fix = (
            "choose another --port, or end what uses it"
            if "in use" in str(error)
            else "give an address of this machine"
        )
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}; {fix}") from error


class HttpProcess:
    """The process that speaks HTTP, and the connection to it; those that make sound and draw hang on it alone."""

    def __init__(
        self,
        listening: socket.socket,
        settings: Settings,
        speaker: Sequence[str] | None,
        painter: Sequence[str] | None = None,
    ) -> None:
        self.link, theirs = Pipe()
        ends: list[Connection | None] = []
        self._helpers: list[subprocess.Popen[bytes]] = []
        for module, told in (("speaker_process", speaker), ("painter_process", painter)):
            own, of_http = Pipe() if told is not None else (None, None)
            ends.append(of_http)
            if own is not None and told is not None:
                words = [sys.executable, "-m", f"megatron_omni.serve.{module}", str(own.fileno()), *told]
                self._helpers.append(subprocess.Popen(words, pass_fds=[own.fileno()]))
                own.close()
        words = [str(end.fileno()) if end is not None else "-" for end in ends]
        words = [
            sys.executable,
            "-m",
            "megatron_omni.serve.http",
            str(theirs.fileno()),
            str(listening.fileno()),
            *words,
        ]
        passed = [theirs.fileno(), listening.fileno(), *(end.fileno() for end in ends if end is not None)]
        self._process = subprocess.Popen(words, pass_fds=passed)
        theirs.close()
        for end in filter(None, ends):
            end.close()
        listening.close()
        self.link.send(settings)

    def end(self) -> None:
        """Wait for its last words; then it is ended."""
        try:
            self._process.wait(_HTTP_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.link.close()

    def abandon(self) -> None:
        """The engine has ended: without its other end the process says so to its clients and ends."""
        self.link.close()
        self.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, serve, and turn what happened into an exit status."""
    leads = int(os.environ.get("RANK", "0")) == 0
    http = None
    try:
        command = parse(argv)
        if leads:
            listening = listen(command.host, command.port)
            port = listening.getsockname()[1]
            http = HttpProcess(listening, command.settings, command.speaker, command.painter)
    except ValueError as error:
        return refused(error)
    say_starting("serve", command.checkpoint)
    from megatron_omni.platform.device import install

    install()
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.serve.leader import SpeakerEnded, lost_rank
    from megatron_omni.training.failure import leave, report_failure

    try:
        run(command, http.link if http is not None else None, port if leads else 0)
    except BaseException as error:
        if isinstance(error, SpeakerEnded):
            status = EXIT_FAILURE
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif (lost := lost_rank(error)) is None:
            status = report_failure(error)
        else:
            status = EXIT_FAILURE
            rank = os.environ.get("RANK", "0")
            print(f"error: {lost}" if leads else f"[rank {rank}] ends: {lost}", file=sys.stderr, flush=True)
        if http is not None:
            http.abandon()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave(status)  # a rank that unwinds politely waits for peers that are waiting for it
        return status
    finally:
        destroy()
        gc.freeze()  # the interpreter's last collection would take a second to find that all of torch is garbage
    if http is not None:
        http.end()
    return 0


def run(command: Command, http: Connection | None, port: int) -> None:
    """Load the model and answer until told to stop; all ranks call this together, rank 0 with the connection to HTTP."""
    from megatron_omni.generation.engine import EngineLimits
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.serve.leader import Leader, facts_of, facts_of_speaker, start_engine
    from megatron_omni.serve.link import Opened, tell
    from megatron_omni.serve.replicas import NoEngine, Replicas, take_part

    scheme = "https" if command.settings.ssl_certfile else "http"
    host = f"[{command.host}]" if ":" in command.host else command.host
    serving = f"serving {command.settings.name} at {scheme}://{host}:{port}/ (OpenAI's API under /v1)"
    if command.only_speaks:
        assert http is not None
        tell(http, Opened(facts_of_speaker(command.checkpoint, command.settings.name), None))
        print(serving, flush=True)
        return Leader(NoEngine(), None, http, grace_seconds=command.grace_seconds).run()
    checkpoint = open_checkpoint(command.checkpoint, overrides=command.overrides)
    if http is not None:
        tell(http, Opened(facts_of(checkpoint, command.settings.name), checkpoint.recipe))
    engine = start_engine(checkpoint, EngineLimits(**command.limits))
    if http is None:
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 says when to stop
            signal.signal(number, signal.SIG_IGN)
        if engine.leads:
            take_part(engine, checkpoint.pg.dp)
        else:
            engine.follow()
        return
    leader = Leader(
        Replicas(engine, checkpoint.pg.dp), checkpoint.builder.tokenizer, http, grace_seconds=command.grace_seconds
    )
    print(serving, flush=True)
    leader.run()


if __name__ == "__main__":
    sys.exit(main())
