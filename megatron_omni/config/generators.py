"""Shapes of what speaks: the speech generator (MoE-TTS, docs/speech.md) and the codec that turns its codes into sound. And of
the codec of pictures (docs/images_out.md).

Plain dataclasses, as config/model.py. The defaults are the released ones: MoE-TTS of Uni-MoE-2.0-Omni, and
WavTokenizer-large-unify-40token. The codec of pictures is ours.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron_omni.config.ranges import file_path, number


@dataclass(frozen=True)
class SpeechIds:
    """Token ids of the speech generator: codes 0 .. C - 1, nine marks, and tokens of text behind them.

    Only codes and marks have a column in the output layer, C + 9 in all (the released 4105).
    """

    num_codes: int
    """C: entries of the codec's codebook."""

    @property
    def text_start(self) -> int:
        """Before the text (released: 4096, bos)."""
        return self.num_codes

    @property
    def codes_start(self) -> int:
        """Before the codes (4097, sos)."""
        return self.num_codes + 1

    @property
    def codes_end(self) -> int:
        """After the codes; the end token of generation (4098, eos)."""
        return self.num_codes + 2

    @property
    def padding(self) -> int:
        """Never used here: lengths come from the data (4099)."""
        return self.num_codes + 3

    @property
    def prompt(self) -> tuple[int, int]:
        """Around the prompt, which names a voice or describes a style (4100, 4101)."""
        return self.num_codes + 4, self.num_codes + 5

    @property
    def prefix(self) -> tuple[int, int]:
        """Around the last codes of the piece before (4102, 4103)."""
        return self.num_codes + 6, self.num_codes + 7

    @property
    def text_end(self) -> int:
        """After the text (4104)."""
        return self.num_codes + 8

    @property
    def num_outputs(self) -> int:
        """Columns of the output layer: codes and marks."""
        return self.num_codes + 9

    def of_text(self, token: int) -> int:
        """The id of a token of the tokenizer."""
        return self.num_outputs + token


@dataclass(kw_only=True)
class SpeechConfig:
    """``model.speech``: the model is a speech generator. ``model.vocab_size`` is then C + 9 (:class:`SpeechIds`)."""

    num_codes: int = number(4096, at_least=1, at_most=10**6)
    """C: entries of the codec's codebook."""
    text_vocab_size: int = number(151936, at_least=1, at_most=10**8)
    """Rows of the frozen table of text embeddings, at least the tokenizer's ids."""
    text_hidden_size: int = number(2048, at_least=1, at_most=10**6)
    """Width of that table; a projection leads to ``hidden_size``."""
    text_table: str | None = file_path(None)
    """Run directory, checkpoint or Hugging Face folder whose word embeddings fill the table where no weights are loaded;
    null: random."""
    codec: str | None = file_path(None)
    """Folder of the codec whose codes are learned and spoken. Codes of another are refused by its fingerprint."""
    codec_fingerprint: str | None = None
    """Of the codec whose codes were learned (``codec.json``). null: training fills it in from its data; a checkpoint that
    has it speaks with no other codec."""
    voices: list[str] = field(default_factory=list)
    """Voices that can be asked for by name. Empty: training fills it in with the speakers of its records; where a
    checkpoint has none, any name is taken."""
    codes_per_second: float = number(40.0, above=0, at_most=1000)
    """Of the codec."""
    prefix_codes: int = number(40, at_least=0, at_most=10_000)
    """Codes of the piece before that a piece continues from (1 s); 0: none."""
    least_prefix_codes: int = number(20, at_least=0, at_most=10_000)
    """In training the prefix has between so many and ``prefix_codes`` codes, drawn for each sample."""
    max_codes: int = number(1800, at_least=1, at_most=10**6)
    """Longest piece in training, and the limit of a spoken one."""
    min_split_tokens: int = number(6, at_least=1, at_most=10**6)
    """Tokens of text before which a sentence end does not begin a new piece."""
    max_split_tokens: int = number(16, at_least=1, at_most=10**6)
    """Tokens of text after which a piece is cut at the next word."""
    least_codes_per_token: float = number(3.0, at_least=0, at_most=1000)
    """A piece does not end before so many codes a token of its text."""
    most_codes_per_token: float = number(32.0, above=0, at_most=1000)
    """A piece that has not ended is cut at so many codes a token of its text, and 40 (and at ``max_codes``)."""
    release: bool = False
    """As the authors' published code speaks: no prefix, no mask of the prompt at inference. For comparison alone."""

    @cached_property
    def ids(self) -> SpeechIds:
        """Its token ids."""
        return SpeechIds(self.num_codes)


@dataclass(kw_only=True)
class CodecConfig:
    """``model.codec``: the model is a codec (WavTokenizer's architecture), trained by ``task: codec``."""

    sample_rate: int = number(24_000, at_least=1000, at_most=384_000)
    """Samples a second."""
    num_codes: int = number(4096, at_least=2, at_most=10**6)
    """Entries of the codebook."""
    code_size: int = number(512, at_least=1, at_most=65536)
    """Width of an entry."""
    encoder: Literal["seanet", "mel"] = "seanet"
    """``seanet``: convolutions on the waveform (released). ``mel``: convolutions on its log-mel spectrogram, which train
    from scratch in minutes."""
    strides: list[int] = number(lambda: [4, 5, 5, 6], at_least=1, at_most=1000)
    """Of SEANet's blocks; their product is the samples of a code (600)."""
    num_filters: int = number(32, at_least=1, at_most=65536)
    """Channels of SEANet's first convolution; each stride doubles them."""
    num_mel_bins: int = number(80, at_least=1, at_most=1024)
    """Bands of the log-mel encoder."""
    encoder_hidden_size: int = number(256, at_least=1, at_most=65536)
    """Width of the log-mel encoder."""
    hidden_size: int = number(768, at_least=64, at_most=65536)
    """Width of the decoder, a multiple of 32."""
    ffn_hidden_size: int = number(2304, at_least=1, at_most=10**6)
    """Width inside its ConvNeXt blocks."""
    num_layers: int = number(12, at_least=1, at_most=1000)
    """ConvNeXt blocks."""
    decoder_span: list[int] = number(list, at_least=0, at_most=10_000)
    """Codes before and after that a code of the decoder attends to, for sound that is the same streamed and whole; its
    GroupNorms then have fixed statistics (models/generators/local_decoder.py). Empty: the whole input (released)."""
    num_bandwidths: int = number(4, at_least=1, at_most=1000)
    """Rows of the adaptive norms; row 0 decodes."""
    dropout: float = number(0.1, at_least=0, below=1)
    """Training only: share of the values inside the decoder's ResNet blocks that is left out."""

    @property
    def hop_size(self) -> int:
        """Samples of a code."""
        size = 1
        for stride in self.strides:
            size *= stride
        return size


@dataclass(kw_only=True)
class PictureCodecConfig:
    """``model.picture_codec``: the model turns pictures into latents and back (models/generators/conv_vae.py), trained by
    ``task: picture_codec``."""

    latent_channels: int = number(4, at_least=1, at_most=4096)
    """C: numbers of a latent's place."""
    channels: list[int] = number(lambda: [64, 128, 256], at_least=1, at_most=65536)
    """Width of each level, the finest first. Each level halves height and width: three make a latent of 8 x 8 pixels."""
    encoder_blocks: list[int] = number(lambda: [1, 1, 2], at_least=0, at_most=1000)
    """Residual blocks of each level of the encoder."""
    decoder_blocks: list[int] = number(lambda: [1, 1, 2], at_least=0, at_most=1000)
    """Residual blocks of each level of the decoder."""
    pixel_channels: int = number(16, at_least=1, at_most=65536)
    """Width of the decoder at full size, where its last convolution joins the edges of what the levels made."""
    latent_scale: float = number(1.0, above=0, at_most=10**6)
    """Factor of the encoder's means that makes latents; ``convert codec --pictures`` measures it."""
    smoothing: float = number(0.0, at_least=0, below=0.5)
    """Share of the step between two pixels across the border of two places that the decoder takes off each of them; ``convert
    codec --pictures`` measures it. 0: none."""

    @property
    def downsampling(self) -> int:
        """Pixels a side that one place of a latent stands for."""
        return 2 ** len(self.channels)
