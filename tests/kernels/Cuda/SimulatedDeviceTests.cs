using System.Globalization;
using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Tests of the simulated device: a kernel with a planted fault is caught, and the message names the thread, the fault and the address. A
/// device that has faulted stays so, as a real one does, so each fault gets its own process.
/// </summary>
public sealed class SimulatedDeviceTests
{
    private const string FaultVariable = "ROLLOUT_TEST_PLANTED_FAULT";
    private const int Threads = 224;
    private const int Columns = 200;
    private const int Rows = 3;

    /// <summary>Sums rows; FAULT plants one.</summary>
    private const string Source = """
        extern "C" __global__ void sum(const float* x, float* y, int columns)
        {
            __shared__ float parts[8];
            if (FAULT == 11 && threadIdx.x == 33)
                return;
            if (FAULT != 10 || threadIdx.x != 7)
                sim_wait_for_earlier_kernels();
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
                y[blockIdx.x + (FAULT == 4 ? 3 : 0)] = total;
            }
            if (FAULT == 5 && threadIdx.x % 32 == 1)
                y[blockIdx.x] = 0;
            if (FAULT == 6 && threadIdx.x < 7)
                __shfl_xor_sync(0xffffffffu, v, 1);
            if (FAULT == 12 && threadIdx.x == 5)
                y[blockIdx.x] = ((const float4*)(x + 1))->y;
        }
        ROLLOUT_KERNEL(sum)
        """;

    [Fact]
    public void A_kernel_without_a_fault_runs_and_is_counted()
    {
        SimulatedDevice.RequireSimulated();
        SimulatedDevice.Counters before = SimulatedDevice.Count();
        float[] sums = Sum(fault: 0);
        for (int row = 0; row < Rows; row++)
            Assert.Equal(Enumerable.Range(row * Columns, Columns).Sum(), sums[row]);
        SimulatedDevice.Counters spent = SimulatedDevice.Count() - before;
        const int Bytes = Rows * Columns * sizeof(float);
        Assert.Equal(
            new(Launches: 1, Bytes, Rows * sizeof(float), Synchronisations: 1, Allocations: 2, 0, 0, 0,
            EarlyLaunches: 1, ReadBytes: Bytes, Mapped: 0), spent);
    }

    [Theory]
    [InlineData(1, "read out of bounds: thread 200 of block (2, 0, 0)", "0 bytes past an allocation of 2400")]
    [InlineData(2, "race of a ", "of block (0, 0, 0) at shared byte")]
    [InlineData(3, "divergent barrier: thread 0 of block (0, 0, 0)", "others of its block do not reach")]
    [InlineData(4, "write out of bounds: thread 0 of block (0, 0, 0)", "0 bytes past an allocation of 12")]
    [InlineData(5, "race of two writes: thread", "at byte 0 of an allocation of 12")]
    [InlineData(6, "divergent barrier: thread 0 of block (0, 0, 0) waits at a warp collective", "")]
    [InlineData(7, "cuMemcpyDtoHAsync_v2", "CUDA_ERROR_INVALID_VALUE")] // read after it was freed
    [InlineData(8, "cuLaunchKernelEx (sum): CUDA_ERROR_INVALID_VALUE", "")] // more threads than a block has
    [InlineData(9, "cuLaunchKernelEx (sum): CUDA_ERROR_INVALID_VALUE", "")] // more shared memory than requested
    [InlineData(
        10, "touched global memory before it waited for the kernel before it: thread 7 of block (0, 0, 0)",
        "at byte 28 of an allocation of 2400")]
    [InlineData(11, "ended without having waited for the kernel before it: thread 33 of block (0, 0, 0)", "")]
    [InlineData(12, "misaligned access: thread 5 of block (0, 0, 0)", "at byte 4 of an allocation of 2400")]
    public async Task A_planted_fault_is_caught(int fault, string what, string where)
    {
        SimulatedDevice.RequireSimulated();
        using OtherProcess process = OtherProcess.Run(
            $"{nameof(SimulatedDeviceTests)}.{nameof(The_planted_fault)}", (FaultVariable, fault.ToString(CultureInfo.InvariantCulture)));
        string output = await process.Ended();
        Assert.Contains(what, output, StringComparison.Ordinal);
        Assert.Contains(where, output, StringComparison.Ordinal);
        Assert.Contains("Failed: 1", output, StringComparison.Ordinal);
    }

    /// <summary>Run by the test above in another process, where it is expected to fail.</summary>
    [Fact(Explicit = true)]
    public void The_planted_fault()
    {
        SimulatedDevice.RequireSimulated();
        _ = Sum(int.Parse(Environment.GetEnvironmentVariable(FaultVariable)!, CultureInfo.InvariantCulture));
    }

    private static unsafe float[] Sum(int fault)
    {
        using CudaDevice device = new(0);
        byte[] code = CudaCompiler.Compile("sum.cu", Source, new Dictionary<string, string>(), [$"-DFAULT={fault}"]);
        using CudaModule module = device.Load(code, "sum.cu");
        using DeviceBuffer x = device.Allocate(sizeof(float) * Rows * Columns);
        using DeviceBuffer y = device.Allocate(sizeof(float) * Rows);
        float[] values = [.. Enumerable.Range(0, Rows * Columns).Select(i => (float)i)];
        fixed (float* source = values)
            Driver.cuMemcpyHtoDAsync_v2(x.Pointer, source, (nuint)x.Bytes, device.Stream.Value).ThrowIfFailed();
        nuint from = x.Pointer, to = y.Pointer;
        int columns = Columns;
        void** arguments = stackalloc void*[] { &from, &to, &columns };
        CUlaunchAttribute early = new()
        {
            id = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            value = new() { programmaticStreamSerializationAllowed = 1 },
        };
        CUlaunchConfig launch = new()
        {
            GridDimX = Rows,
            GridDimY = 1,
            GridDimZ = 1,
            BlockDimX = fault == 8 ? 1056u : Threads,
            BlockDimY = 1,
            BlockDimZ = 1,
            SharedMemBytes = fault == 9 ? 64u << 10 : 0,
            hStream = device.Stream.Value,
            attrs = &early,
            numAttrs = 1,
        };
        Driver.cuLaunchKernelEx(&launch, module.Function("sum"), arguments, null).ThrowIfFailed("sum", nameof(Driver.cuLaunchKernelEx));
        if (fault == 7)
            y.Dispose();
        float[] sums = new float[Rows];
        fixed (float* destination = sums)
            Driver.cuMemcpyDtoHAsync_v2(destination, to, (nuint)y.Bytes, device.Stream.Value).ThrowIfFailed();
        device.Stream.Synchronize();
        return sums;
    }
}
