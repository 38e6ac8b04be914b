namespace Rollout.Client;

/// <summary>A tensor in a GPU's memory, of any framework: contiguous, row-major.</summary>
/// <param name="Name">The Hugging Face checkpoint's.</param>
/// <param name="DType">Of its elements.</param>
/// <param name="Shape">Of the full tensor.</param>
/// <param name="Address">Of its first element on the device. Must stay valid until the push has ended.</param>
public sealed record DeviceTensor(string Name, TensorDType DType, IReadOnlyList<long> Shape, nint Address);
