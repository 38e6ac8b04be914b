namespace Rollout.Kernels.Cuda;

/// <summary>The two forms of a tensor: fp32, and as a matmul reads it.</summary>
public sealed unsafe partial class CudaBackend
{
    /// <summary>A tensor's values to the host.</summary>
    internal void Read(CudaTensor tensor, int rows, Span<float> destination)
    {
        Flush();
        Device.MakeCurrent();
        CopyOut(
            tensor.IsRounded ? tensor.Rounded : tensor.Fp32, !tensor.IsRounded || StoresFp32,
            destination[..(rows * tensor.Columns)], Device.Stream);
    }

    private nuint Fp32(CudaTensor tensor, int rows)
    {
        if (tensor.IsRounded && !StoresFp32)
        {
            long count = (long)rows * tensor.Columns;
            Launch(_kernels.Widen, Blocks(count, 4), Threads, tensor.Rounded, tensor.Fp32, count);
        }

        tensor.IsRounded = false;
        return tensor.Fp32;
    }

    private nuint Rounded(CudaTensor tensor, int rows)
    {
        if (!tensor.IsRounded && !StoresFp32)
        {
            // The fp32 values remain the tensor's: rounding them again later gives the same.
            long count = (long)rows * tensor.Columns;
            Launch(_kernels.Round, Blocks(count, 4), Threads, tensor.Fp32, tensor.Rounded, count);
        }

        return tensor.Rounded;
    }
}
