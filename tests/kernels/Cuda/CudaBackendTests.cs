using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>The CUDA backend on the simulated device: what every backend promises.</summary>
public abstract class CudaBackendTests(WeightFormat format) : BackendTests
{
    protected override WeightFormat Format => format;

    /// <summary>A block of 256 fibers each.</summary>
    protected override int Draws => 1000;

    protected override IBackend Create()
    {
        SimulatedDevice.Require();
        return new CudaBackend(0, format);
    }
}

public sealed class CudaFp32Tests() : CudaBackendTests(WeightFormat.Float32);

public sealed class CudaBf16Tests() : CudaBackendTests(WeightFormat.BFloat16)
{
    /// <summary>bf16 has 8 bits of a number; a result may have passed through it twice.</summary>
    protected override double Rounding => 1.0 / 128;
}
