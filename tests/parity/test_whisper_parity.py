"""The audio encoder against transformers' Whisper, and its full size against the specification."""

from dataclasses import replace

import pytest
import torch
from transformers import WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import sinusoids as whisper_sinusoids

from megatron_omni.checkpoint.names import whisper_decoder_rows, whisper_encoder_rows
from megatron_omni.config.model import AudioConfig, ModelConfig
from megatron_omni.models.encoders.audio import AudioEncoder, sinusoids
from tests.parity.loading import load_rows

TINY = AudioConfig(
    num_mel_bins=16,
    chunk_seconds=0.6,
    hidden_size=24,
    ffn_hidden_size=40,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_attention_heads=3,
    num_query_tokens=4,
    max_target_positions=7,
)


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)


def random_whisper() -> WhisperModel:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=11,
        num_mel_bins=16,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_source_positions=30,
        max_target_positions=7,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def features() -> torch.Tensor:
    return torch.randn(3, 16, 60, generator=generator("features"))


def loaded(config: AudioConfig = TINY) -> tuple[AudioEncoder, WhisperModel]:
    theirs, ours = random_whisper(), AudioEncoder(config, 20)
    ours.draw_weights(generator)
    rows = [*whisper_encoder_rows(config, prefix="encoder."), *whisper_decoder_rows(config, prefix="decoder.")]
    used = load_rows(ours, rows, theirs.state_dict(), prefix="audio.")
    assert theirs.state_dict().keys() - used == {"decoder.embed_tokens.weight"}
    torch.nn.init.normal_(ours.qformer.query_tokens, generator=generator("queries"))
    return ours, theirs


def test_encoder_and_causal_queries_equal_transformers() -> None:
    ours, theirs = loaded()
    with torch.no_grad():
        frames = theirs.encoder(features()).last_hidden_state
        torch.testing.assert_close(ours._encode(features()), frames, atol=1e-5, rtol=1e-5)
        queries = ours.qformer.query_tokens.expand(3, -1, -1)
        expected = theirs.decoder(inputs_embeds=queries, encoder_hidden_states=frames).last_hidden_state
        torch.testing.assert_close(ours.qformer(frames), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(features()), ours.projector(expected), atol=1e-5, rtol=1e-5)
    assert frames.std() > 0.05 and expected.std() > 0.05


def test_gradients_equal_transformers() -> None:
    ours, theirs = loaded()
    ours.qformer(ours._encode(features())).square().mean().backward()
    queries = ours.qformer.query_tokens.detach().clone().requires_grad_()
    theirs(
        input_features=features(), decoder_inputs_embeds=queries.expand(3, -1, -1)
    ).last_hidden_state.square().mean().backward()
    ours_of = {"encoder": "tower", "decoder": "qformer"}
    expected = {f"{ours_of[n.split('.')[0]]}.{n.partition('.')[2]}": p for n, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if name.startswith("projector.") or name == "tower.embed_positions.weight":
            continue
        grad = queries.grad if name == "qformer.query_tokens" else expected[name].grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-3)
        compared += 1
    assert compared == (4 + 2 + 2 * 15) + (1 + 1 + 2 + 2 * 24)


def test_causal_queries_see_earlier_queries_and_bidirectional_ones_see_all() -> None:
    for causal in (True, False):
        ours, _ = loaded(replace(TINY, causal_queries=causal))
        with torch.no_grad():
            frames = ours._encode(features())
            before = ours.qformer(frames)
            ours.qformer.query_tokens[0, 2, 5] += 1.0
            moved = (ours.qformer(frames) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.tolist() == ([False, False, True, True] if causal else [True] * 4)


def test_bidirectional_queries_equal_the_layers_with_an_open_mask() -> None:
    ours, theirs = loaded(replace(TINY, causal_queries=False))
    with torch.no_grad():
        frames = ours._encode(features())
        hidden = (ours.qformer.query_tokens + theirs.decoder.embed_positions.weight[:4]).expand(3, -1, -1)
        for layer in theirs.decoder.layers:
            hidden = layer(hidden, torch.zeros(3, 1, 4, 4), frames, use_cache=False)
        torch.testing.assert_close(ours.qformer(frames), theirs.decoder.layer_norm(hidden), atol=1e-5, rtol=1e-5)


def test_dropout_and_layerdrop_are_off_in_training() -> None:
    ours, _ = loaded()
    with torch.no_grad():
        assert torch.equal(ours.train()(features()), ours.eval()(features()))


def test_a_frozen_tower_costs_no_backward_and_the_rest_still_learns() -> None:
    ours, _ = loaded()
    ours.tower.requires_grad_(False)
    ours(features()).square().sum().backward()
    assert all(p.grad is None for p in ours.tower.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.projector.parameters())
    assert ours.qformer.query_tokens.grad.abs().sum() > 0


def test_encoder_positions_are_whispers_and_stay_fixed() -> None:
    ours = AudioEncoder(TINY, 20)
    ours.draw_weights(generator)
    torch.testing.assert_close(ours.tower.embed_positions.weight, whisper_sinusoids(30, 24), atol=1e-5, rtol=0)
    assert not ours.tower.embed_positions.weight.requires_grad


def test_aligned_queries_start_in_the_middle_of_their_span() -> None:
    """30 positions for 4 queries: spans of 7.5, so query 1 covers positions 7.5..14 and its middle is 10.75."""
    ours = AudioEncoder(replace(TINY, query_init="aligned"), 20)
    ours.draw_weights(generator)
    expected = sinusoids(torch.tensor([3.25, 10.75, 18.25, 25.75]), 24)
    torch.testing.assert_close(ours.qformer.query_tokens[0].double(), 0.3 * expected, atol=1e-6, rtol=0)
    nearest = (ours.qformer.query_tokens[0] @ ours.tower.embed_positions.weight.T).argmax(1)
    assert nearest.tolist() == [3, 11, 18, 26]


def test_normal_queries_have_a_standard_deviation_of_two_hundredths() -> None:
    ours = AudioEncoder(replace(TINY, num_query_tokens=400, max_target_positions=400), 20)
    ours.draw_weights(generator)
    assert abs(ours.qformer.query_tokens.std().item() - 0.02) < 0.001


def test_full_size_counts_637_million_parameters() -> None:
    """Whisper-large-v3: encoder 636,968,960; decoder 840 M without its token table."""
    config = ModelConfig()
    with torch.device("meta"):
        encoder = AudioEncoder(config.audio, config.hidden_size)
    assert sum(p.numel() for p in encoder.tower.parameters()) == 636_968_960
    qformer = sum(p.numel() for n, p in encoder.qformer.named_parameters() if n != "query_tokens")
    assert qformer == 32 * (2 * (4 * 1280**2 + 3 * 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 6 * 1280) + 450 * 1280
    assert encoder.qformer.query_tokens.shape == (1, 200, 1280)


def test_a_chunk_of_no_whole_number_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chunk_seconds=0\.61"):
        AudioEncoder(replace(TINY, chunk_seconds=0.61), 20)
