"""What quantization cost a language model: perplexity, divergence, agreement, speed."""

from jaxq.evaluate.evaluation import Evaluation as Evaluation
from jaxq.evaluate.evaluation import evaluate as evaluate
from jaxq.evaluate.evaluation import logits_of as logits_of
from jaxq.evaluate.language_model import LONGEST_WINDOW as LONGEST_WINDOW
from jaxq.evaluate.language_model import LanguageModel as LanguageModel
from jaxq.evaluate.language_model import batch_size as batch_size
from jaxq.evaluate.language_model import evaluate_text as evaluate_text
from jaxq.evaluate.language_model import perplexity as perplexity
from jaxq.evaluate.language_model import text_windows as text_windows
from jaxq.evaluate.size import bits_per_weight as bits_per_weight
from jaxq.evaluate.size import parameter_count as parameter_count
from jaxq.evaluate.size import stored_bytes as stored_bytes
from jaxq.evaluate.windows import cut_windows as cut_windows
from jaxq.evaluate.windows import draw_windows as draw_windows
