using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Tests of the tester: a kernel with a planted fault is caught, and the message says who did what where. A device that has faulted stays so,
/// as a real one does, so each fault gets a process of its own.
/// </summary>
public sealed unsafe class SimulatedDeviceTests
{
    private const int Threads = 224;
    private const int Columns = 200;
    private const int Rows = 3;

    /// <summary>Sums rows; FAULT plants one.</summary>
    private const string Source = """
        extern "C" __global__ void sum(const float* x, float* y, int columns)
        {
            __shared__ float parts[8];
            float v = FAULT == 1 || threadIdx.x < columns ? x[blockIdx.x * columns + threadIdx.x] : 0;
            for (int d = 16; d > 0; d /= 2)
                v += __shfl_xor_sync(0xffffffffu, v, d);
            if (threadIdx.x % 32 == 0)
                parts[threadIdx.x / 32] = v;
            if (FAULT != 2 && (FAULT != 3 || threadIdx.x < 64))
                __syncthreads();
            if (threadIdx.x == 0)
            {
                float total = 0;
                for (int w = 0; w < blockDim.x / 32; w++)
                    total += parts[w];
                y[blockIdx.x] = total;
            }
        }
        ROLLOUT_KERNEL(sum)
        """;

    [Fact]
    public void A_kernel_without_a_fault_runs()
    {
        SimulatedDevice.Require();
        float[] sums = Sum(fault: 0);
        for (int row = 0; row < Rows; row++)
            Assert.Equal(Enumerable.Range(row * Columns, Columns).Sum(), sums[row]);
    }

    private static float[] Sum(int fault)
    {
        Driver.cuInit(0).ThrowIfFailed();
        using CudaContext context = new(0);
        byte[] code = CudaCompiler.Compile("sum.cu", Source, new Dictionary<string, string>(), [$"-DFAULT={fault}"]);
        using CudaModule module = new(context, code, "sum.cu");
        using CudaStream stream = new(context);
        using DeviceBuffer x = new(context, sizeof(float) * Rows * Columns);
        using DeviceBuffer y = new(context, sizeof(float) * Rows);
        float[] values = [.. Enumerable.Range(0, Rows * Columns).Select(i => (float)i)];
        fixed (float* source = values)
            Driver.cuMemcpyHtoDAsync_v2(x.Pointer, source, (nuint)x.Bytes, stream.Value).ThrowIfFailed();
        nuint from = x.Pointer, to = y.Pointer;
        int columns = Columns;
        void** arguments = stackalloc void*[] { &from, &to, &columns };
        Driver.cuLaunchKernel(module.Function("sum"), Rows, 1, 1, Threads, 1, 1, 0, stream.Value, arguments, null).ThrowIfFailed("sum");
        float[] sums = new float[Rows];
        fixed (float* destination = sums)
            Driver.cuMemcpyDtoHAsync_v2(destination, y.Pointer, (nuint)y.Bytes, stream.Value).ThrowIfFailed();
        stream.Synchronize();
        return sums;
    }
}
