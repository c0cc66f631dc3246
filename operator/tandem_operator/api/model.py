"""What is served: weights, number formats, adapters."""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by
from tandem_operator.api.model_uri import PATTERN, ModelUri
from tandem_operator.api.refusal import refused_unless

ResourceName = Annotated[
    str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
ServedName = Annotated[
    str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")
]
_CEL_URI = PATTERN.replace("\\", "\\\\")


class ModelFormat(StrEnum):
    """How the weights are stored."""

    AUTO = "Auto"
    SAFETENSORS = "Safetensors"
    GGUF = "Gguf"
    DUMMY = "Dummy"


class Dtype(StrEnum):
    """The number format in which the model computes."""

    AUTO = "Auto"
    BFLOAT16 = "BFloat16"
    FLOAT16 = "Float16"
    FLOAT32 = "Float32"


class Quantization(StrEnum):
    """The number format in which the weights are kept."""

    NONE = "None"
    FP8 = "Fp8"
    W8A16 = "W8A16"
    AWQ = "Awq"
    GPTQ = "Gptq"


class KvCacheDtype(StrEnum):
    """The number format of the KV cache."""

    AUTO = "Auto"
    FP8 = "Fp8"


class ModelCache(ApiObject):
    """Where downloads, converted weights and compiled kernels are kept between pods."""

    claim_name: ResourceName | None = None
    """A PersistentVolumeClaim (ReadWriteMany for several nodes) that all workers share, and routers
    too when they download; without it each pod downloads and converts into an emptyDir."""


class Adapter(ApiObject):
    """A LoRA adapter, served as a model with its own name."""

    name: ServedName
    """The model name under which requests choose this adapter."""
    uri: Annotated[str, Field(min_length=1, max_length=1024)]
    """Where the adapter's weights are; the schemes of model.uri."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"self.uri.matches('{_CEL_URI}') && !self.uri.startsWith('mock://')",
            "adapters.uri is not a location of weights: write it like hf://org/name, pvc://claim/path,"
            " file:///path, s3://bucket/prefix, oci://image or package://name",
            ".uri",
        ),
    )


class Model(ApiObject):
    """The model that the fleet serves."""

    uri: Annotated[str, Field(min_length=1, max_length=1024)]
    """Where the weights are: hf://org/name, pvc://claim/path, file:///path (on the node),
    s3://bucket/prefix, oci://image (image volume), package://name (an installed Python package that
    ships weights) or mock://profile (no weights: a latency model, for tests; mock://tiny?decode_ms=30
    changes options of a profile)."""
    name: ServedName | None = None
    """The name under which requests choose the model; default: metadata.name."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    """Branch, tag or commit of the weights; part of the compatibility hash, so KV never crosses
    it."""
    format: ModelFormat = ModelFormat.AUTO
    """How the weights are stored; Dummy makes random weights, for benchmarks."""
    dtype: Dtype = Dtype.AUTO
    """The number format in which the model computes; Auto takes that of the weights."""
    quantization: Annotated[
        Quantization,
        refused_unless(Quantization.NONE, because="weights stay in the format of their files"),
    ] = Quantization.NONE
    """The number format in which the weights are kept."""
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        refused_unless(KvCacheDtype.AUTO, because="the KV cache always has the model's dtype"),
    ] = KvCacheDtype.AUTO
    """The number format of the KV cache; Auto takes dtype."""
    max_model_len: Annotated[int, Field(ge=16, le=10_485_760)] | None = None
    """The longest sequence in tokens, prompt and output together; default: the model's own
    limit."""
    trust_remote_code: Annotated[
        bool, refused_unless(False, because="nothing loads code that comes with a tokenizer")
    ] = False
    """Whether Python code that comes with the tokenizer may run."""
    secret_name: ResourceName | None = None
    """A Secret with the download credentials (keys HF_TOKEN, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY); mounted into the workers, never read by the operator."""
    cache: ModelCache = ModelCache()
    """Where downloads, converted weights and compiled kernels are kept between pods."""
    adapters: Annotated[
        tuple[Adapter, ...],
        Field(max_length=64, json_schema_extra=keyed_by("name")),
        refused_unless((), because="no worker loads adapters"),
    ] = ()
    """LoRA adapters that are served in addition to the model."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"self.uri.matches('{_CEL_URI}')",
            "model.uri is not a location of weights: write it like hf://org/name, pvc://claim/path,"
            " file:///path, s3://bucket/prefix, oci://image, package://name or mock://profile",
            ".uri",
        ),
        Rule(
            "!self.uri.startsWith('s3://')",
            "model.uri starts with s3://, and no worker of this release reads from S3: write it"
            " like hf://org/name, pvc://claim/path or oci://image",
            ".uri",
        ),
        Rule(
            "self.kvCacheDtype != 'Fp8' || !(self.quantization in ['Awq', 'Gptq'])",
            "model.kvCacheDtype Fp8 doesn't work with quantization Awq or Gptq, whose kernels keep"
            " KV in 16 bits: set kvCacheDtype: Auto or another quantization",
            ".kvCacheDtype",
        ),
        Rule(
            "self.kvCacheDtype != 'Fp8' || self.dtype != 'Float32'",
            "model.kvCacheDtype Fp8 needs a 16-bit dtype: set dtype to BFloat16 or Float16, or"
            " kvCacheDtype to Auto",
            ".kvCacheDtype",
        ),
        Rule(
            "self.format != 'Gguf' || self.quantization == 'None'",
            "model.quantization must be None with format Gguf, because a GGUF file has its own"
            " quantization: remove quantization",
            ".quantization",
        ),
        Rule(
            "!has(self.name) || !self.adapters.exists(a, a.name == self.name)",
            "model.adapters has an entry with the name of the model itself, so requests can't"
            " choose between them: rename the adapter",
            ".adapters",
        ),
        Rule(
            "!self.uri.startsWith('mock://') || size(self.adapters) == 0",
            "model.adapters can't be loaded into a mock:// model: remove adapters or serve weights",
            ".adapters",
        ),
    )

    @property
    def source(self) -> ModelUri:
        """The URI in its parts. Raises ValueError if the CRD's rule was bypassed."""
        return ModelUri.parse(self.uri)
