"""Every numeric tolerance of the tests, and why it is what it is."""

FP32_LOGITS = 1e-4
"""Largest difference of float32 logits between two eager implementations that sum the same products in another order.
Logits of gemma3-tiny reach 11, where a float32 step is 1e-6; measured 1e-5 over six layers."""

FP32_LOGITS_270M = 4e-4
"""The same for the real 270M, whose logits reach 33 over eighteen layers; measured 4e-5 over 965 positions."""

FP32_ATTENTION = 1e-5
"""Largest difference of one attention's float32 outputs of order 1, between torch's kernels and the reference body:
sums of 8 to 53 products in another order. Measured 1e-6."""

INT8_ACTIVATIONS = 0.1
"""Root mean square difference of gemma3-tiny's logits (deviation 2.5) from the same codes with float32 activations:
ONNX Runtime rounds activations to int8, here in blocks of 32 of a width of 64. Measured 0.058; int4 codes alone move
the logits by 0.86, so wrong codes do not pass."""

INT8_EXPERTS = 0.15
"""Root mean square difference of gpt-oss-tiny's logits (deviation 2.5) between float32 and ONNX Runtime's int8, of
weights and of inputs of products, where routers leave no doubt which experts are chosen. Measured 0.10 to 0.11 over
three seeds. Where they do leave doubt, 3 to 5% of the choices differ, and it is 0.2 to 0.6."""

ONNX_LOGITS_270M = 1e-3
"""Float32 logits of the 270M from ONNX Runtime or the rewritten graph against Hugging Face's: other kernels sum
the same products in another order. Logits reach 33; the certificate's bound."""

BF16_STEP = 0.0625
"""Largest difference of bfloat16 logits that went through the same rounding steps, where sums stand in another order:
one step of bfloat16 between 8 and 16. Measured 0."""

BF16_RMS = 0.3
"""Root mean square difference of gemma3-tiny's logits (deviation 2.5) between bfloat16 and float32 arithmetic on the
same int4 weights. A bfloat16 number has 8 bits, and the stream of six layers is rounded some forty times. Measured
0.18; 0.04 on unrounded weights."""

BFLOAT16_LOGITS_XLA = 0.1
"""Root mean square difference of gemma3-tiny's bfloat16 logits (deviation 2.5) between XLA and the reference: both
round each operation to 8 bits, but XLA rounds products of matrices and rotations once. Measured 0.039, as far as either
is from float32."""

FLOAT16_LOGITS = 0.15
"""Largest difference of gemma3-tiny's logits (up to 11, deviation 2.5) between float16 and float32 arithmetic: 11 bits
of weights and activations. Measured 0.035 as it is, and up to 0.05 with planted weights whose values need float32
islands. A value that overflows gives no number at all."""

BUCKET = 1 / 16
"""Width of an observer's bucket, relative to where it begins: as well as a percentile is known."""

FP8_WEIGHTS = 0.6
"""Root mean square difference of gemma3-tiny's logits (deviation 2.5) between weights of 8-bit floats and the weights
that they were rounded from: 4 significant bits. Measured 0.30, between int8's 0.07 and int4's 0.68."""

CONFORMANCE_LOGITS = 3e-4
"""Logits of the conformance suite's float32 models (up to 9) against a float64 reference that shares no code with
them. Measured 6e-5 at most (eager, transformers, graphs; artifacts 5e-5): attention is far from uniform there, and
passes rounded scores on. Each planted fault moves some logit by more than 1."""

CONFORMANCE_FAULT = 1.0
"""What a planted fault must move some logit of the suite by, at least: thousands of times the tolerance, so that no
rounding can hide it. Measured 2.5 and more over 21 faults."""

FLOAT64_LOGITS = 1e-10
"""Two float64 implementations of one model, logits up to 9: sums in another order. Measured 2e-13."""

BF16_ATTENTION = 0.02
"""Largest difference between attention in bfloat16 with float32 sums and in float32 on the same rounded inputs: weights
and results of order 1 are rounded to 8 bits. Measured 0.005."""

FP32_PRODUCT = 3e-6
"""Largest difference of float32 products of 256 terms, relative to the largest, where scales come before or after the
sum. Measured 7e-7."""

FP32_SUMS = 1e-5
"""Largest difference between two float32 kernels that add the same terms (up to 4112) in another order, relative to the
largest result. Measured 1.5e-6 for products of 640 terms."""

BFLOAT16_LOGITS_TENSORRT = 0.12
"""Root mean square difference of gemma3-tiny's logits (deviation 2.5) between the `tensorrt` dialect in bfloat16, each
operation rounded once, and either bfloat16 or float32 arithmetic on the same weights. Measured 0.041 for both, whatever
the scheme, and up to 0.050 where scales are rounded too."""

BFLOAT16_SOFT_TOKENS = 0.015
"""Root mean square difference of gemma3-vision-tiny's soft tokens (deviation 0.8) between bfloat16, each operation
rounded once, and float32: two layers. Measured 0.005; in float16 0.0007."""

FP8_ACTIVATIONS = 0.6
"""Root mean square difference of gemma3-tiny's logits (deviation 2.5) between activations of 8-bit floats (four
significant bits) in bfloat16, and float32 ones, on the same weights. Measured 0.29."""

CONFORMANCE_FLOAT16 = 0.15
"""Logits of the conformance suite's models (up to 9) in float16 against the float64 reference: attention is far from
uniform there. Measured 0.06 and, with a window of one, 0.014."""

TF32_LOGITS = 0.1
"""Largest difference of gemma3-tiny's logits (up to 11) on a GPU whose float32 products keep 11 bits of each factor: as
float16's, 0.035. Not measured: no GPU was at hand."""

BFLOAT16_270M = 0.02
"""Median over positions of the largest difference between the real 270M's logits in bfloat16 and in float32, as a share
of the largest logit. Measured 0.010."""

FUZZED_LOGITS = 1e-5
"""Largest difference of float32 logits from transformers', relative to the largest, of fuzzed checkpoints of three
layers and a width of 16: the same products, summed in another order. Measured 1e-6."""

BF16_RESULTS = 2**-8
"""Largest difference of one operation's bfloat16 results, relative to the largest, where both sides compute in float32
and round once: sums that differ in their last digits may round to neighbours. Measured 0."""

FP16_ATTENTION = 2**-9
"""Largest difference of one attention in float16, relative to the largest result: targets round queries, scores,
weights and results to 11 bits, some before and some after they are scaled."""

FP32_GRADIENTS = 1e-5
"""Largest difference of a float32 gradient from the plain module's, relative to the largest of its tensor (or to 1, if
that is smaller): the same products, of a padded batch in place of single sequences. Measured 2e-6."""

FLOAT64_SUMS = 1e-12
"""Share by which two float64 sums of a few numbers differ, in another order."""

PARALLEL_LOSSES = 1e-5
"""Losses of a few steps, norms of gradients and the first step's gradients, of two processes against one, relative to
the largest (or to 1): means of the same numbers in another order. Measured 7e-7; gradients 1.1e-7."""

PARALLEL_WEIGHTS = 1e-5
"""The same of weights after a few steps of Adam at a rate of 2e-3, which divides by gradients that may be rounding
alone. Measured 7e-7."""

BATCHED_KL = 1e-5
"""Share by which a KL of whole continuations, of float32 weights to int8, differs between rows that run together and
one at a time: products summed in another order."""

EXPERTS_OF_8_BITS = 3e-2
"""Largest difference, relative to the largest result, of ONNX Runtime's experts of 8-bit codes, whose inputs it rounds
to 8 bits whatever is asked for, from the same codes with float32 activations. Measured 1.6e-2."""
