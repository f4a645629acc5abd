"""The lean T5 against transformers' own, opened from a written bundle."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from serving.bundle import Bundle
from serving.items.histories import history_tokens
from serving.network.model import StreamRec
from serving.network.t5 import T5, Dropout, ModelConfig
from serving.types import Ages
from tests.builders import tiny_bundle


@torch.no_grad()
def test_transformers_opens_the_bundle_and_agrees(tmp_path):
    bundle = Bundle.load(tiny_bundle(tmp_path / "b"))
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "b/model").eval()
    histories = [(1, 2, 3, 4, 5, 6, 7, 8), (9,), (10, 11, 12)]
    tokens, mask = history_tokens(histories, bundle.catalogue.tokens, bundle.max_items, (1,))
    decoder = torch.tensor([[2, 10, 11, 17]]).expand(3, -1)
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=decoder).logits
    t5 = bundle.network.t5
    cross = bundle.network.cross_keys_values(bundle.network.encode(tokens, mask, "bidirectional", 3), mask, 3)
    at = torch.arange(decoder.shape[1])
    bias = t5.decoder.position_bias(at, at).masked_fill(at[None, :] > at[:, None], float("-inf"))
    hidden, _ = t5.decode(t5.shared(decoder), bias.unsqueeze(0), cross, None)
    torch.testing.assert_close(t5.logits(hidden), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_position_buckets_are_those_of_transformers_at_any_distance(tmp_path):
    bundle = Bundle.load(tiny_bundle(tmp_path / "b"))
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "b/model").eval()
    at = torch.arange(200)
    for stack, other in ((bundle.network.t5.encoder, theirs.encoder), (bundle.network.t5.decoder, theirs.decoder)):
        attention = other.block[0].layer[0].SelfAttention
        expected = attention.compute_bias(200, 200)[0]
        visible = torch.ones(200, 200, dtype=torch.bool) if stack.bidirectional else at[None, :] <= at[:, None]
        torch.testing.assert_close(stack.position_bias(at, at)[:, visible], expected[:, visible])


def test_a_new_network_is_as_wide_spread_as_transformers_own():
    config = ModelConfig(400, d_model=64, d_kv=8, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=2)
    expected = T5ForConditionalGeneration(T5Config(**config.to_transformers())).state_dict()
    found = T5(config).state_dict()
    for name, values in found.items():
        if "layer_norm" in name:
            assert (values == 1).all()
        else:  # the smallest table has 64 numbers
            assert values.std() == pytest.approx(float(expected[name].std()), rel=0.4), name
            assert abs(values.mean()) < values.std() / 2, name


def test_dropout_leaves_out_its_share_and_the_mean_as_it_is():
    torch.manual_seed(0)
    x = torch.full((123, 457), 2.0)  # not a multiple of the four that share a number
    for share in (0.1, 0.5):
        dropped = Dropout(share)(x)
        values, counts = dropped.unique(return_counts=True)
        torch.testing.assert_close(values, torch.tensor([0, 2 / (1 - share)]), rtol=1e-4, atol=0)
        assert float(counts[0] / x.numel()) == pytest.approx(share, abs=0.01)
        columns = dropped.flatten()[: x.numel() // 4 * 4].view(-1, 4) == 0  # the four are apart from one another
        assert torch.corrcoef(columns.T.float()).sub(torch.eye(4)).abs().max() < 0.05
        assert Dropout(share).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("share", [1e-12, 1e-6, 7.6e-6, 2e-5, 0.5, 1 - 2e-5, 1 - 1e-6, 1 - 1e-12])
def test_dropout_of_any_share_keeps_a_multiple_of_what_it_keeps(share):
    """The share is rounded to a 65,536th, of which at least one is kept."""
    torch.manual_seed(0)
    dropped = Dropout(share)(torch.ones(1_000_000))
    kept = max(1, round((1 - share) * 2**16)) / 2**16
    expected = 1_000_000 * kept
    found = dropped[dropped != 0]
    assert abs(len(found) - expected) <= 5 * (expected * (1 - kept)) ** 0.5
    torch.testing.assert_close(found, torch.full_like(found, 1 / kept))


@torch.no_grad()
def test_a_causal_encoder_does_not_see_later_items(tmp_path):
    network = Bundle.load(tiny_bundle(tmp_path / "b")).network
    tokens = torch.randint(8, 20, (1, 9))
    mask = torch.ones(1, 9, dtype=torch.bool)
    before = network.encode(tokens, mask, "causal-by-item", 3)
    changed = tokens.clone()
    changed[0, 6:] = 9
    after = network.encode(changed, mask, "causal-by-item", 3)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_the_age_bias_begins_as_a_recency_that_halves_from_head_to_head():
    table = StreamRec(
        ModelConfig(20, 16, 4, 16, 1, 1, 3), items=2, step_form="both", ages=Ages(4)
    ).heads.age_bias.weight
    torch.testing.assert_close(
        table.detach(), torch.tensor([[0.0, 0, 0], [-1, -0.5, -0.25], [-2, -1, -0.5], [-3, -1.5, -0.75]])
    )


@torch.no_grad()
@pytest.mark.parametrize("suffix", [(), (1,)])
def test_the_age_bias_is_a_row_of_its_table_per_item_counted_from_the_newest(tmp_path, suffix):
    bundle = Bundle.load(tiny_bundle(tmp_path / "b", age_bias=True, suffix_tokens=suffix))
    histories = [(1, 2, 3, 4, 5, 6, 7, 8), (9,), (10, 11, 12), ()]
    _, mask = history_tokens(histories, bundle.catalogue.tokens, bundle.max_items, suffix)
    hidden = torch.randn(*mask.shape, 16)
    bias = bundle.network.cross_keys_values(hidden, mask, 3).bias
    table = bundle.network.heads.age_bias.weight
    for row, items in enumerate((6, 1, 3, 0)):  # the encoder reads the last six
        ages = [items - 1 - item for item in range(items) for _ in range(3)] + [0] * len(
            suffix or () if items else (0,)
        )
        for head in range(2):
            real = bias[row, head, 0, : len(ages)]
            torch.testing.assert_close(real, table[ages, head])
            assert (bias[row, head, 0, len(ages) :] == float("-inf")).all()
