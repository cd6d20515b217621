"""RecBole's own SASRec on prepared batches, for `benchmarks.training --recbole PYTHON`; run by that interpreter.

    PYTHON -m benchmarks.recbole_sasrec BATCHES.npz ITEMS WIDTH HISTORY BLOCKS HEADS DROPOUT

RecBole 1.2.1 pins packages that clash with ours (ray, numpy 1 idioms), so it lives in an environment of its own:
`pip install recbole==1.2.1 --no-deps` beside colorlog, colorama, texttable, thop, tabulate, tensorboard and torch.
Only its model and loss are used: its data loader makes one padded row for every training pair, as is done here.
"""

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def main() -> None:
    from recbole.model.sequential_recommender import SASRec

    path, *sizes = sys.argv[1:]
    items, width, history, blocks, heads = (int(size) for size in sizes[:5])
    torch.set_num_threads(1)
    dropout = float(sizes[5])
    config: dict[str, Any] = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": history, "device": "cpu", "loss_type": "CE",
        "n_layers": blocks, "n_heads": heads, "hidden_size": width, "inner_size": 4 * width, "hidden_act": "gelu",
        "hidden_dropout_prob": dropout, "attn_dropout_prob": dropout, "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
    }  # fmt: skip
    model = SASRec(config, SimpleNamespace(num=lambda _: items + 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    stored = np.load(path)
    rows, lengths, targets = (torch.from_numpy(stored[name]) for name in ("rows", "lengths", "targets"))
    positions, started = 0, 0.0
    for step, (row, length, target) in enumerate(zip(rows, lengths, targets, strict=True)):
        if step == 1:  # the first one imports and allocates
            started = time.process_time()
        model.calculate_loss({"item_list": row, "length": length, "item": target}).backward()
        optimiser.step()
        optimiser.zero_grad()
        positions += len(target) * (step > 0)
    print(json.dumps(positions / (time.process_time() - started)))


if __name__ == "__main__":
    main()
