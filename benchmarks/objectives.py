"""Objectives and deferral costs where the assistant is better nearly everywhere: a tiny pair, trained from scratch.

python -m benchmarks.objectives GSM8K/train.jsonl

It prints the table of docs/training.md, in three minutes on one core.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from collm.core.head import DeferralHead, defer_probs
from collm.core.objective import Objective, marginal_logprobs
from collm.training.module import JointModule

VOCAB, LENGTH, BATCH, STEPS = 600, 96, 8, 100
RATES = (0.05, 0.1, 0.3, 0.5)
WAYS: list[tuple[Objective, float]] = [("marginal", 0.0), ("marginal", 1.0), ("separate", 0.0), ("separate", 1.0)]
Data = tuple[Tensor, Tensor]
"""Token ids after a first token 0, (N, LENGTH + 1), and which of those after it are targets, (N, LENGTH)."""


def encoded(tokenizer: Tokenizer, texts: list[str]) -> Data:
    ids, mask = torch.zeros(len(texts), LENGTH + 1, dtype=torch.long), torch.zeros(len(texts), LENGTH, dtype=torch.bool)
    for row, text in enumerate(texts):
        found = tokenizer.encode(text).ids[:LENGTH]
        ids[row, 1 : 1 + len(found)] = torch.tensor(found)
        mask[row, : len(found)] = True
    return ids, mask


def untrained(layers: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": layers}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": LENGTH + 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **heads, **sizes))


def draw(data: Data, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.randint(len(data[0]), (BATCH,), generator=generator)
    longest = int(data[1][chosen].sum(1).max())
    return chosen, data[0][chosen, : longest + 1], data[1][chosen, :longest]


def gold(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def gold_of(model: LlamaForCausalLM, data: Data) -> Tensor:
    return torch.cat([gold(model, part) for part in data[0].split(25)])


def pretrain(model: LlamaForCausalLM, data: Data, steps: int) -> LlamaForCausalLM:
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        _, ids, mask = draw(data, generator)
        optimizer.zero_grad()
        (-gold(model, ids)[mask].mean()).backward()
        optimizer.step()
        schedule.step()
    return model


def trained(joint: JointModule, data: Data, assistant: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(10 + seed)
    groups = [{"params": joint.base.parameters(), "lr": 2e-3}, {"params": joint.head.parameters(), "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        chosen, ids, mask = draw(data, generator)
        scores = assistant[chosen][:, : mask.shape[1], None]
        optimizer.zero_grad()
        joint(mask, scores, input_ids=ids[:, :-1], gold=ids[:, 1:])["loss"].backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measured(joint: JointModule, data: Data, assistant: Tensor) -> list[float]:
    """NLL of the base, at each of `RATES`, and of the mixture, in nats per token."""
    base, mask = joint.base, data[1]
    hidden = torch.cat([base.model(part[:, :-1]).last_hidden_state for part in data[0].split(25)])
    u, of_base, of_assistant = joint.head(hidden)[mask], gold_of(base, data)[mask], assistant[mask]
    order, nlls = defer_probs(u).argsort(descending=True), [-of_base.mean()]
    for rate in RATES:
        cut = int(rate * len(order))
        nlls.append(-(of_assistant[order[:cut]].sum() + of_base[order[cut:]].sum()) / len(order))
    nlls.append(-marginal_logprobs(of_base, of_assistant[:, None], u).mean())
    return [nll.item() for nll in nlls]


def main(path: str) -> None:
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(texts[:800], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>"]))
    train, test = encoded(tokenizer, texts[:800]), encoded(tokenizer, texts[5000:5120])
    assistant, base = pretrain(untrained(2, 96), train, 300), pretrain(untrained(1, 48), train, 20)
    scores, on_test = gold_of(assistant, train), gold_of(assistant, test)
    better = (scores > gold_of(base, train))[train[1]].double().mean().item()
    print(f"the assistant is better at {better:.0%} of the training tokens; {int(test[1].sum())} test tokens")
    print("| objective, cost | base alone | " + " | ".join(f"{rate:.0%}" for rate in RATES) + " | mixed |")
    for objective, cost in WAYS:
        found = []
        for seed in (0, 1):
            joint = JointModule(copy.deepcopy(base), DeferralHead(48), deferral_costs=[cost], objective=objective)
            trained(joint, train, scores, seed)
            found.append(measured(joint, test, on_test))
        means = torch.tensor(found).mean(0).tolist()
        print(f"| `{objective}`, {cost:g} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
