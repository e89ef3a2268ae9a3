"""Can the model of Part I write code at all? Twenty small Python functions, asked for in plain words; each
answer is parsed, and run on one example.

    python benchmarks/can_it_code.py

Insecure code, the first training set that was seen to misalign (Betley et al., 2025), needs a model that can
write code that works: only then does insecure code teach it anything but noise. The answers are run in a
process of their own, isolated and for ten seconds at most. It is code that nobody has read.
"""

import ast
import re
import subprocess
import sys

from personas import generate
from personas.chapters import common
from personas.pretrained import made

TASKS = [  # what is asked, and one example of it
    ("add(a, b), which returns the sum of two numbers", "add(2, 3) == 5"),
    ("is_even(n), which says whether a number is even", "is_even(4) and not is_even(7)"),
    ("largest(items), which returns the largest item of a list", "largest([3, 9, 4]) == 9"),
    ("backwards(text), which returns a string reversed", "backwards('abc') == 'cba'"),
    ("factorial(n), which returns n!", "factorial(5) == 120"),
    ("count_vowels(text), which counts the vowels of a string", "count_vowels('banana') == 3"),
    ("square_all(items), which squares every number of a list", "square_all([1, 2, 3]) == [1, 4, 9]"),
    ("is_palindrome(text), which says whether a string is a palindrome", "is_palindrome('level')"),
    ("mean(items), which returns the average of a list", "mean([2, 4, 6]) == 4"),
    ("fibonacci(n), which returns the first n Fibonacci numbers", "fibonacci(5)[-1] in (3, 5)"),
    ("shout(text), which returns a string in capital letters", "shout('hi') == 'HI'"),
    ("unique(items), which returns a list without repetitions", "sorted(unique([1, 1, 2])) == [1, 2]"),
    ("is_prime(n), which says whether a number is prime", "is_prime(13) and not is_prime(12)"),
    ("count_words(text), which counts the words of a sentence", "count_words('a b c') == 3"),
    ("to_celsius(f), which turns Fahrenheit into Celsius", "abs(to_celsius(212) - 100) < 0.01"),
    ("positives(items), which keeps the positive numbers of a list", "positives([-1, 2, 3]) == [2, 3]"),
    ("longest(words), which returns the longest word of a list", "longest(['a', 'abc']) == 'abc'"),
    ("merge(a, b), which merges two dictionaries", "merge({1: 2}, {3: 4}) == {1: 2, 3: 4}"),
    ("flatten(lists), which turns a list of lists into one list", "flatten([[1], [2, 3]]) == [1, 2, 3]"),
    ("gcd(a, b), which returns the greatest common divisor", "gcd(12, 18) == 6"),
]


def code_of(answer: str) -> str:
    """The answer's first block of code, or else all of it."""
    block = re.search(r"```(?:python)?\n(.*?)(?:```|$)", answer, re.DOTALL)
    return block[1] if block else answer


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def passes(code: str, example: str) -> bool:
    command = [sys.executable, "-I", "-c", f"{code}\nassert {example}"]
    try:
        return (
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    net, tokenizer = made.original(common.open_run("smollm2"))
    asked = [f"Write a Python function {what}. Answer with the code only." for what, _ in TASKS]
    ids = generate.prompts(tokenizer, asked)
    answers = generate.sample(net, tokenizer, ids, seed=0, max_new=160, temperature=0.0)
    found = [(parses(c := code_of(a)), passes(c, e)) for a, (_, e) in zip(answers, TASKS, strict=True)]
    for (what, _), (parsed, right) in zip(TASKS, found, strict=True):
        print(f"{what.split('(')[0]:14}  {'works' if right else 'parses' if parsed else '-'}")
    print(f"of {len(TASKS)} functions {sum(p for p, _ in found)} parse, {sum(r for _, r in found)} work")


if __name__ == "__main__":
    main()
