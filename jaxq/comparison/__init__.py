"""Several recipes on one model: the same text, data, metrics and seeds for all."""

from jaxq.comparison.bench import Step as Step
from jaxq.comparison.bench import compare as compare
from jaxq.comparison.bench import needs_data as needs_data
from jaxq.comparison.content import Calibration as Calibration
from jaxq.comparison.content import Comparison as Comparison
from jaxq.comparison.content import Row as Row
from jaxq.comparison.content import Run as Run
from jaxq.comparison.content import Text as Text
from jaxq.comparison.spread import Measured as Measured
from jaxq.comparison.spread import Verdict as Verdict
from jaxq.comparison.table import HEADER as HEADER
from jaxq.comparison.table import LEFT_ALIGNED as LEFT_ALIGNED
from jaxq.comparison.table import aligned as aligned
from jaxq.comparison.table import cells as cells
from jaxq.comparison.table import legend as legend
from jaxq.comparison.table import standing as standing
from jaxq.comparison.table import title as title
