"""The speech generator (MoE-TTS of Uni-MoE-2.0): text goes in, codes of sound come out, on the language trunk.

    e(i) = word_embeddings[i]                      codes and marks, ids 0 .. C + 8
    e(i) = W text_table[i - (C + 9)] + b           text, ids from C + 9 on
    p(y_k | prompt, prefix, text, y_<k) = softmax(O h + o)        C + 9 columns, h of the trunk

``SpeechIds`` (config/generators.py) says which id is what, data/speech_sequence.py in what order they come and who sees
whom: prompt, prefix and text all see each other, codes see these and the codes before them. The trunk, its layouts,
its loss and its cache are the language model's; the mixture is its MoE layer with ``top_k: 2``, no null and no shared
experts. The bias o is ``model.output_bias``.

The table (311 M of the released 1.6 B parameters) is another model's word embeddings and is never trained: it has no
gradient and no optimizer state, and lies whole on every rank of the first pipeline stage. So does the projection, whose
gradient every tensor-parallel rank finds whole.

Source: Uni-MoE-2.0-Omni (https://arxiv.org/abs/2511.12609), section 2.4, and its published inference code.

Shapes: B rows, S tokens, H hidden size, D width of the table.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from megatron_omni.config.model import ModelConfig
from megatron_omni.models.encoders.weights import draw_normal
from megatron_omni.models.omni import OmniModel


class SpeechModel(OmniModel):
    """Text table, projection and trunk of one pipeline stage. Parameters: ``text_table.*``, ``text_projection.*``,
    ``language.*``."""

    text_table: nn.Embedding
    text_projection: nn.Linear

    def add_inputs(self, model: ModelConfig) -> None:
        """See :meth:`OmniModel.add_inputs`."""
        super().add_inputs(model)
        assert model.speech is not None and self.vision is None and self.audio is None
        self.ids, self.table_std = model.speech.ids, model.init_method_std
        if self.pre_process:
            self.text_table = nn.Embedding(model.speech.text_vocab_size, model.speech.text_hidden_size)
            self.text_table.weight.requires_grad_(False)
            self.text_projection = nn.Linear(model.speech.text_hidden_size, model.hidden_size)

    def draw_inputs(self, only: Collection[str] | None = None) -> None:
        """See :meth:`OmniModel.draw_inputs`. Projected rows are about as large as those of the table, and a random table's
        as those of the word embeddings."""
        if not self.pre_process:
            return
        stds = {"text_table.weight": self.table_std, "text_projection.weight": self.text_table.embedding_dim**-0.5}
        for name in stds if only is None else stds.keys() & only:
            draw_normal(self.get_parameter(name), stds[name], self._generator(name))
        if only is None or "text_projection.bias" in only:
            nn.init.zeros_(self.text_projection.bias)

    @property
    def num_input_ids(self) -> int:
        """C + 9 and the rows of the table."""
        speech = self.language.model_config.speech
        assert speech is not None
        return self.ids.of_text(speech.text_vocab_size)

    def embed_ids(self, input_ids: Tensor) -> Tensor:
        """[S, B, H] of ``input_ids`` [B, S]."""
        # Both of every token, then the one that counts: to pick the tokens of text, a device would have to be waited for.
        ids = input_ids.t().contiguous()
        is_text = ids >= self.ids.num_outputs
        hidden = self.language.embed(torch.where(is_text, self.ids.padding, ids).t())
        words = self.text_table((ids - self.ids.num_outputs).clamp(min=0))
        return torch.where(is_text.unsqueeze(-1), self.text_projection(words), hidden)
