"""The difference of mean activations on fixed answers, after minus before. No dictionary."""


def find(case):
    return case.answers_after.mean(0) - case.answers_before.mean(0)
