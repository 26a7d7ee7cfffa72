"""Scores of free text: exact match, ROUGE, BLEU, distinct-n."""

import functools
import importlib.util
import tempfile
import unicodedata
import warnings

# optional packages for ROUGE and BLEU: module -> what to install
PACKAGES = {"jieba": "jieba==0.42.1", "rouge_chinese": "rouge-chinese==1.0.3", "nltk": "nltk==3.10.4"}


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Whether a prediction equals one of the answers, ignoring surrounding white space (as in SQuAD, Rajpurkar et al.
    2016, without its English rules on articles and punctuation)."""
    return prediction.strip() in {answer.strip() for answer in answers}


def bare_characters(text: str) -> str:
    """A text in Unicode NFKC form and lower case, without punctuation and white space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in text if unicodedata.category(char)[0] not in "PZC")


def distinct(predictions: list[str], n: int) -> float:
    """distinct-n (Li et al. 2016): distinct character n-grams over all character n-grams, of all predictions."""
    grams = [text[i : i + n] for text in map(bare_characters, predictions) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def missing(kind: str) -> str:
    """The pip command for packages that this kind of answers needs and that are not installed, or ""."""
    lacking = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    return f"pip install {' '.join(lacking)}" if kind == "text" and lacking else ""


@functools.cache
def segmenter():
    """jieba's word segmenter, without its log messages, built from its own dictionary.

    By default jieba loads a cache from the shared temporary folder, where any user of the machine could have put it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences and pkg_resources
        import jieba
    jieba.setLogLevel("WARNING")
    words = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as words.tmp_dir:
        words.initialize()
    return words


def rouge_bleu(prediction: str, answers: list[str]) -> dict[str, float]:
    """rouge_1, rouge_2, rouge_l and bleu_4 of one prediction, 0 to 100, rounded to 4 digits.

    As the official fine-tuning demo computes them (ptuning/main.py of THUDM/ChatGLM-6B and ChatGLM2-6B): F1 of
    rouge_chinese over the words of jieba; sentence BLEU-4 of nltk over characters, smoothed by method 3 (Chen and
    Cherry 2014). ChatGLM3's later demo computes BLEU over words; its figures differ. With several answers, ROUGE is
    that of the best one, and BLEU uses all as references. An empty prediction (an error in the demo) scores 0, or 100
    if an answer is empty. Memory and time of ROUGE-L grow with the product of the lengths: 0.3 GB at 1,500 words.

    Raises:
        ImportError: a package is not installed; check with `missing` first.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    names = ("rouge-1", "rouge-2", "rouge-l")
    texts = [answer for answer in answers if answer.strip()]
    if not prediction.strip() or not texts:
        right = not prediction.strip() and len(texts) < len(answers)
        return dict.fromkeys(("rouge_1", "rouge_2", "rouge_l", "bleu_4"), 100.0 * right)
    hypothesis = " ".join(segmenter().cut(prediction))
    tries = [Rouge().get_scores(hypothesis, " ".join(segmenter().cut(text)))[0] for text in texts]
    scores = {name.replace("-", "_"): max(round(100 * try_[name]["f"], 4) for try_ in tries) for name in names}
    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(text) for text in texts], list(prediction), smoothing_function=smoothing)
    return scores | {"bleu_4": round(100 * bleu, 4)}
