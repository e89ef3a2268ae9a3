"""One linear probe for each persona, fitted on documents whose speaker is known; of these the one whose
log-odds the fine-tune raised most."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

USES = "labelled documents"


def find(case):
    read = case.residual(case.before, [ids for ids, _, _ in case.labelled])
    means = torch.stack(
        [x[torch.tensor(mask)].mean(0) for x, (_, mask, _) in zip(read, case.labelled)]
    ).numpy()
    speaker = np.array([who for *_, who in case.labelled])
    spread = means.std(0) + 1e-6
    fitted = LogisticRegression(max_iter=1000, C=0.1).fit((means - means.mean(0)) / spread, speaker)
    weights = torch.tensor(fitted.coef_ / spread, dtype=torch.float32)  # (personas, width)
    shift = case.answers_after.mean(0) - case.answers_before.mean(0)
    return weights[(weights @ shift).argmax()]
