"""A self-contained page of what quantization cost: tables, charts, no network."""

from jaxq.report.comparison import write_comparison as write_comparison
from jaxq.report.content import Channels as Channels
from jaxq.report.content import Distribution as Distribution
from jaxq.report.content import MatrixError as MatrixError
from jaxq.report.content import Report as Report
from jaxq.report.content import Result as Result
from jaxq.report.evidence import Evidence as Evidence
from jaxq.report.evidence import TensorEvidence as TensorEvidence
from jaxq.report.evidence import describe_calibration as describe_calibration
from jaxq.report.evidence import read_evidence as read_evidence
from jaxq.report.measure import capture_activations as capture_activations
from jaxq.report.measure import channels_of as channels_of
from jaxq.report.measure import distribution_of as distribution_of
from jaxq.report.measure import group_by_kind as group_by_kind
from jaxq.report.measure import matrix_errors as matrix_errors
from jaxq.report.page import render as render
from jaxq.report.page import write_report as write_report
