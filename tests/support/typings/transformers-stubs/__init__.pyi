# What is used of `transformers` itself. Its own __init__ names all of its models for whoever checks types, 3,000 files
# that take half of the time. A name that is missing here is an error of the check: add it.
from transformers import pytorch_utils as pytorch_utils
from transformers.configuration_utils import PreTrainedConfig as PreTrainedConfig
from transformers.configuration_utils import PretrainedConfig as PretrainedConfig
from transformers.generation.configuration_utils import GenerationConfig as GenerationConfig
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto
from transformers.models.bloom.configuration_bloom import BloomConfig as BloomConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config as GPT2Config
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig as GPTNeoXConfig
from transformers.models.llama.configuration_llama import LlamaConfig as LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification as LlamaForSequenceClassification
from transformers.models.mistral.configuration_mistral import MistralConfig as MistralConfig
from transformers.models.opt.configuration_opt import OPTConfig as OPTConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast as PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerCallback as TrainerCallback
from transformers.trainer_utils import set_seed as set_seed

AutoConfig = configuration_auto.AutoConfig
AutoModelForCausalLM = modeling_auto.AutoModelForCausalLM
AutoModelForSequenceClassification = modeling_auto.AutoModelForSequenceClassification
AutoTokenizer = tokenization_auto.AutoTokenizer
