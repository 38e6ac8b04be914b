namespace Rollout.Kernels;

/// <summary>How a backend stores matrices. Vectors (norms, biases) are fp32 with every format.</summary>
public enum WeightFormat
{
    /// <summary>As checkpoints have them. Activations stay fp32.</summary>
    BFloat16,

    /// <summary>
    /// 8 bits an element and one scale per output, quantised when a row is written; activations are quantised too, per row and block of 128
    /// inputs. Half the memory and several times the arithmetic, for a small error in every log-probability: never the default.
    /// </summary>
    Int8,
}
