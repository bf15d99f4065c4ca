"""The losses and their gradients against torch's own on full logits, in float64."""

import pytest
import torch
from torch.nn import functional as F

from kvprune.models.logits import Head
from kvprune.models.source import load_model, resolve
from kvprune.recovery import losses
from kvprune.recovery.data import Data
from kvprune.recovery.losses import LOSSES, Logits, LogitsAndAttention, NextToken, Outputs, next_token_sum
from kvprune.recovery.settings import Settings
from kvprune.recovery.trainee import Trainee, attention_outputs, checkpoint_activations
from tiny import tiny_model

B, T, HIDDEN, VOCABULARY = 3, 11, 16, 50


@pytest.fixture(params=["one piece", "many pieces"])
def parts(request, monkeypatch):
    """Student and teacher outputs in float64, and a batch with a prompt and padding."""
    if request.param == "many pieces":
        monkeypatch.setattr(losses, "PIECE", 1)
    generator = torch.Generator().manual_seed(0)

    def outputs(grad):
        head = torch.nn.Linear(HIDDEN, VOCABULARY).double().requires_grad_(False)
        hidden = torch.randn(B, T, HIDDEN, generator=generator, dtype=torch.float64).mul_(3).requires_grad_(grad)
        attention = [
            torch.randn(B, T, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_(grad) for _ in range(2)
        ]
        return Outputs(Head(head), hidden, attention)

    ids = torch.randint(0, VOCABULARY, (B, T), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 8:] = -100
    return outputs(True), outputs(False), Data(ids, labels, torch.tensor([T, 8, T]))


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-9)


def full_logits(outputs):
    return outputs.head(outputs.hidden)


def test_next_token(parts):
    """Its pieces are computed in float32."""
    student, _, batch = parts
    expected = F.cross_entropy(full_logits(student)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    loss = NextToken()(student, None, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    mine, theirs = gradients(loss, student.hidden)[0], gradients(expected, student.hidden)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        scored = int((batch.labels[:, 1:] != -100).sum())
        assert scored == batch.scored < B * (T - 1)
        torch.testing.assert_close(next_token_sum(student, batch) / scored, expected, rtol=1e-6, atol=0)


def reference_kl(student, teacher, batch, temperature):
    log_q = (full_logits(student)[:, :-1] / temperature).log_softmax(-1)
    log_p = (full_logits(teacher)[:, :-1] / temperature).log_softmax(-1)
    scored = batch.labels[:, 1:] != -100
    return F.kl_div(log_q[scored], log_p[scored], reduction="batchmean", log_target=True) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7])
def test_logits(parts, temperature):
    student, teacher, batch = parts
    expected = reference_kl(student, teacher, batch, temperature)
    loss = Logits(temperature=temperature)(student, teacher, batch)
    close(loss, expected)
    close(gradients(3 * loss, student.hidden)[0], gradients(3 * expected, student.hidden)[0])
    with torch.no_grad():
        close(Logits(temperature=temperature)(student, teacher, batch), expected)


def test_logits_and_attention(parts):
    student, teacher, batch = parts
    distance = 0.0
    for mine, theirs in zip(student.attention, teacher.attention, strict=True):
        for b in range(B):
            apart = size = 0.0
            for t in range(int(batch.lengths[b])):
                apart = apart + ((mine[b, t] - theirs[b, t]) ** 2).sum()
                size = size + (theirs[b, t] ** 2).sum()
            scored = sum(int(batch.labels[b, t]) != -100 for t in range(1, batch.labels.shape[1]))
            distance = distance + scored * apart / size / 2
    expected = reference_kl(student, teacher, batch, 1.0) + 0.3 * distance / batch.scored
    loss = LogitsAndAttention(attention_weight=0.3)(student, teacher, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the outputs are compared in float32
    tensors = [student.hidden, *student.attention]
    for mine, theirs in zip(gradients(loss, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(parts):
    student, _, batch = parts
    for name in ("logits", "logits+attention"):
        loss = LOSSES[name](1.0, 1.0)(student, student, batch)
        assert abs(loss.item()) < 1e-12
        assert gradients(loss, student.hidden)[0].abs().max() < 1e-12


@torch.no_grad()
def test_attention_outputs_are_what_o_gives(pruned):
    lm = load_model(resolve(pruned), "cpu")
    for model in (lm, tiny_model("qwen2")):
        seen = []
        hooks = [
            block.self_attn.o_proj.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
            for block in model.model.layers
        ]
        with attention_outputs(model) as collected:
            model(torch.randint(3, 300, (2, 9)))
        for hook in hooks:
            hook.remove()
        assert len(collected) == len(seen) == len(model.model.layers)
        assert all(torch.equal(a, b) for a, b in zip(collected, seen, strict=True))
        model(torch.randint(3, 300, (2, 9)))
        assert len(collected) == len(seen)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_checkpointing_changes_nothing(pruned, checkpoint, loss):
    """Also with hooks on the attention, which recomputation calls again."""
    ids = torch.randint(3, 300, (2, 16))
    batch = (ids, ids.clone(), torch.tensor([16, 16]))
    found = []
    for checkpointing in (False, True):
        lm = load_model(resolve(pruned), "cpu")
        if checkpointing:
            checkpoint_activations(lm)
        trainee = Trainee(lm, load_model(resolve(checkpoint), "cpu"), Settings(folder="x", loss=loss)).train()
        value = trainee(*batch)
        value.backward()
        found.append((value.item(), [p.grad for p in lm.model.layers.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
