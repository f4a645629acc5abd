"""What the method adds to a T5, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serving.bundle import Bundle
from serving.engine import Engine
from serving.network.model import FORGOTTEN, StreamRec, dense_logits
from serving.network.t5 import ModelConfig
from serving.types import Ages, RuntimeName, StepForm
from tests.builders import tiny_bundle, tiny_model

WIDTH = 6
CONFIG = ModelConfig(12, d_model=WIDTH, d_kv=2, d_ff=4, num_layers=1, num_decoder_layers=1, num_heads=2)


def made(form: StepForm = "both") -> StreamRec:
    """A network whose heads, zero at the start, say something."""
    torch.manual_seed(0)
    network = StreamRec(CONFIG, items=4, step_form=form)
    torch.nn.init.normal_(network.heads.feedback.weight)
    torch.nn.init.normal_(network.heads.item_free.weight)
    return network


@torch.no_grad()
def test_a_step_reads_the_token_the_state_or_both():
    token, state = torch.tensor([[3, 5]]), torch.randn(1, 2, WIDTH)
    forms: tuple[StepForm, ...] = ("token", "state", "both")
    found = {form: made(form).step_input(token, state) for form in forms}
    network = made()
    torch.testing.assert_close(found["token"], network.t5.shared.weight[token])
    torch.testing.assert_close(found["state"], state @ network.heads.feedback.weight.T)
    torch.testing.assert_close(found["both"], found["token"] + found["state"])


@torch.no_grad()
def test_a_new_network_feeds_nothing_back_and_knows_items_by_their_tokens_alone():
    network = StreamRec(CONFIG, items=2, step_form="both", ages=Ages(3))
    token, state = torch.tensor([[3, 5]]), torch.randn(1, 2, WIDTH)
    torch.testing.assert_close(network.step_input(token, state), network.t5.shared.weight[token])
    item_tokens = torch.tensor([[3, 7, 9], [4, 7, 9]])
    torch.testing.assert_close(network.item_vectors(item_tokens), network.t5.shared.weight[item_tokens].sum(1))
    assert network.heads.age_bias.weight.shape == (3, 2)
    assert not hasattr(made().heads, "age_bias"), "without ages there is no weight that a T5 has not"


@torch.no_grad()
def test_an_items_vector_and_its_score_by_hand():
    network = made()
    tokens = torch.tensor([[3, 7, 9], [4, 7, 9], [4, 8, 9], [3, 8, 10]])
    vectors = network.item_vectors(tokens)
    table, free = network.t5.shared.weight, network.heads.item_free.weight
    torch.testing.assert_close(vectors[3], table[3] + table[8] + table[10] + free[3])
    state = torch.randn(2, 5, WIDTH)
    logits = dense_logits(state, vectors)
    assert logits.shape == (2, 5, 4)
    assert float(logits[1, 2, 3]) == pytest.approx(float(state[1, 2] @ vectors[3]) / WIDTH**0.5, rel=1e-4)


@torch.no_grad()
def test_heads_are_two_layers_with_a_relu_between():
    network, x = made(), torch.randn(7, WIDTH)
    for head in (network.heads.state, network.heads.residual):
        (w1, b1, w2, b2), found = head.parameters(), head(x)
        torch.testing.assert_close(found, (x @ w1.T + b1).clamp(min=0) @ w2.T + b2)
        assert (found < 0).any()


@torch.no_grad()
def test_prefixes_see_their_own_items_and_know_how_old_each_is():
    """Of a history of four items with two tokens each: the prefixes of two, three and four items."""
    torch.manual_seed(0)
    network = StreamRec(CONFIG, items=4, step_form="both", ages=Ages(2))
    torch.nn.init.normal_(network.heads.age_bias.weight)
    cross = network.prefixes(torch.randn(3, 8, WIDTH), first=2, targets=3, per_item=2)
    assert cross.bias.shape == (3, 2, 3, 8)  # B, H, T, S
    ages = ([1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0])  # older than 1 counts as 1
    for prefix, age in enumerate(ages):
        seen, unseen = cross.bias[1, :, prefix, : len(age)], cross.bias[1, :, prefix, len(age) :]
        torch.testing.assert_close(seen, network.heads.age_bias.weight[age].T)
        assert (unseen == float("-inf")).all()


@torch.no_grad()
def test_the_encoder_reads_a_vector_of_each_item_that_it_was_trained_on():
    torch.manual_seed(0)
    network = StreamRec(CONFIG, items=4, step_form="both", reads_items=True).eval()
    tokens = torch.tensor([[3, 7, 4, 7, 5, 8, 1], [3, 7, 0, 0, 0, 0, 0]])  # two tokens an item; 1 ends the history
    items = torch.tensor([[3, 9, 0], [3, -1, -1]])  # 9 came after training
    table, embedded = network.heads.item_input.weight, network.t5.shared.weight[tokens]
    torch.testing.assert_close(network.embed_history(tokens, items, 2), embedded)  # all are zero at the start
    torch.nn.init.normal_(table)
    added = network.embed_history(tokens, items, 2) - embedded
    nothing = torch.zeros(WIDTH)
    torch.testing.assert_close(added[0], torch.stack([table[3]] * 2 + [nothing] * 2 + [table[0]] * 2 + [nothing]))
    torch.testing.assert_close(added[1], torch.stack([table[3]] * 2 + [nothing] * 5))


@torch.no_grad()
def test_while_training_some_items_are_read_by_their_tokens_alone():
    torch.manual_seed(0)
    network = StreamRec(CONFIG, items=4, step_form="both", reads_items=True).train()
    torch.nn.init.normal_(network.heads.item_input.weight)
    tokens, items = torch.full((100, 40), 3), torch.zeros(100, 20, dtype=torch.int64)
    added = network.embed_history(tokens, items, 2) - network.t5.shared.weight[3]
    forgotten = (added.abs().amax(-1) < 1e-6).view(100, 20, 2)
    assert torch.equal(forgotten[..., 0], forgotten[..., 1])  # an item's tokens are read alike
    assert abs(float(forgotten.float().mean()) - FORGOTTEN) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("per_item", [1, 2, 3])
@pytest.mark.parametrize("suffix", [0, 1, 2, 3, 4])
def test_what_follows_the_items_does_not_make_them_older(per_item: int, suffix: int):
    """Of three items and of one: the suffix may be as long as an item, or longer."""
    network = StreamRec(CONFIG, items=4, step_form="both", ages=Ages(5, suffix))
    torch.nn.init.normal_(network.heads.age_bias.weight)
    real = torch.tensor([[3 * per_item + suffix], [per_item + suffix]])
    mask = torch.arange(3 * per_item + suffix) < real
    bias = network.history_bias(mask, per_item)
    for row, ages in enumerate(([2, 1, 0], [0])):
        expected = [age for age in ages for _ in range(per_item)] + [0] * suffix
        torch.testing.assert_close(bias[row, :, 0, : len(expected)], network.heads.age_bias.weight[expected].T)
        assert (bias[row, :, 0, len(expected) :] == float("-inf")).all()


@torch.no_grad()
@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_every_runtime_knows_the_suffix_of_its_bundle(tmp_path: Path, runtime: RuntimeName):
    folder = tiny_bundle(tmp_path / "b", sizes=(80,), age_bias=True, suffix_tokens=(1,))
    for bundle in (Bundle.load(folder), tiny_model(sizes=(80,), age_bias=True, suffix_tokens=(1,))):
        mask = torch.ones(1, 4, dtype=torch.bool)  # of three items
        bias = Engine(bundle, runtime=runtime).runtime.cross_keys_values(torch.randn(1, 4, 16), mask).bias
        torch.testing.assert_close(bias[0, :, 0], bundle.network.heads.age_bias.weight[[2, 1, 0, 0]].T)
