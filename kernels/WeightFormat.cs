namespace Rollout.Kernels;

/// <summary>
/// How a backend stores matrices, and how a matmul converts activations. Vectors (norms, biases) are fp32 with every format.
/// </summary>
public enum WeightFormat
{
    /// <summary>As checkpoints have them. Activations stay fp32: the most exact, and the default.</summary>
    BFloat16,

    /// <summary>
    /// As checkpoints have them, and activations are rounded to bf16 before every matmul, as a GPU's matmul does: twice the arithmetic rate
    /// where the processor has AVX512-BF16.
    /// </summary>
    BFloat16Fast,

    /// <summary>
    /// 8 bits an element and one scale per output, quantised when a row is written; activations are quantised too, per row and block of 128
    /// inputs. Half the memory and several times the arithmetic rate, at the cost of a small error in every log-probability: never the
    /// default.
    /// </summary>
    Int8,

    /// <summary>fp32 weights, activations, keys and values: for checking a GPU's arithmetic against a reference. CUDA only.</summary>
    Float32,
}

/// <summary>Formats by the names used in options.</summary>
public static class WeightFormats
{
    private static readonly (string Name, WeightFormat Format)[] s_all =
    [
        ("bf16", WeightFormat.BFloat16), ("bf16-fast", WeightFormat.BFloat16Fast), ("int8", WeightFormat.Int8),
        ("fp32", WeightFormat.Float32),
    ];

    /// <summary>All names; the first is the default's.</summary>
    public static string[] Names { get; } = [.. s_all.Select(entry => entry.Name)];

    /// <summary>Those of the CPU; the first is the default's.</summary>
    public static string[] CpuNames { get; } = [.. Names.Except(["fp32"])];

    /// <exception cref="InvalidOperationException">There is no such format.</exception>
    public static WeightFormat Parse(string name) => s_all.First(entry => entry.Name == name).Format;

    public static string NameOf(WeightFormat format) => s_all.First(entry => entry.Format == format).Name;
}
