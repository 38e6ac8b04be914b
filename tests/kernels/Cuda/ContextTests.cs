using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// The current context of a thread is shared with other libraries: torch, for one, sets its own between two of our calls, and must find it
/// unchanged when we free something.
/// </summary>
public sealed class ContextTests
{
    private const string DevicesVariable = "ROLLOUT_SIM_DEVICES";

    [Fact]
    public void A_foreign_context_between_two_steps_changes_nothing()
    {
        SimulatedDevice.RequireSimulated();
        float[][] expected = Steps(() => { });
        Assert.Equal(expected, Steps(() => Driver.cuCtxSetCurrent(0).ThrowIfFailed()));
    }

    [Fact]
    public async Task Another_devices_context_between_two_steps_changes_nothing() =>
        await WithTwoDevices(nameof(Steps_beside_another_device));

    [Fact(Explicit = true)]
    public void Steps_beside_another_device()
    {
        SimulatedDevice.RequireSimulated();
        float[][] expected = Steps(() => { });
        using CudaDevice other = new(1);
        using DeviceBuffer buffer = other.AllocateZeroed(16);
        other.MakeCurrent();
        nint context = Current();
        Assert.Equal(expected, Steps(() => Driver.cuCtxSetCurrent(context).ThrowIfFailed()));
    }

    [Fact]
    public void What_was_current_before_a_handle_was_released_is_so_afterwards()
    {
        SimulatedDevice.RequireSimulated();
        using CudaDevice device = new(0);
        DeviceBuffer buffer = device.Allocate(16);
        CudaEvent @event = device.CreateEvent();
        Driver.cuCtxSetCurrent(0).ThrowIfFailed();
        buffer.Dispose();
        @event.Dispose();
        Assert.Equal(0, Current());
        device.MakeCurrent();
        nint ours = Current();
        device.Allocate(16).Dispose();
        Assert.NotEqual(0, ours);
        Assert.Equal(ours, Current());
    }

    [Fact]
    public async Task A_handle_of_one_device_is_released_beside_another() =>
        await WithTwoDevices(nameof(Releases_beside_another_device));

    [Fact(Explicit = true)]
    public void Releases_beside_another_device()
    {
        SimulatedDevice.RequireSimulated();
        using CudaDevice first = new(0), second = new(1);
        DeviceBuffer ofFirst = first.Allocate(16), more = first.Allocate(16);
        using DeviceBuffer ofSecond = second.Allocate(4);
        second.MakeCurrent();
        ofFirst.Dispose();
        second.Upload(ofSecond.Pointer, [1, 2, 3, 4]);
        byte[] read = new byte[4];
        second.Download(ofSecond.Pointer, read);
        Assert.Equal([1, 2, 3, 4], read);

        // The simulated device refuses a call without a context, so that the test above is meaningful.
        CudaException error = Assert.Throws<CudaException>(() => second.Upload(more.Pointer, [1]));
        Assert.StartsWith("cuMemcpyHtoDAsync_v2 (1 bytes): CUDA_ERROR_INVALID_CONTEXT", error.Message, StringComparison.Ordinal);
        more.Dispose();
    }

    /// <summary>A device that is used again after its last user was disposed: threads still have the old context.</summary>
    [Fact]
    public void A_device_is_used_again_from_a_thread_that_knew_the_last_one()
    {
        SimulatedDevice.RequireSimulated();
        for (int i = 0; i < 2; i++)
        {
            using CudaDevice device = new(0);
            using DeviceBuffer buffer = device.AllocateZeroed(16);
            device.Upload(buffer.Pointer, [1]);
        }
    }

    private static async Task WithTwoDevices(string test)
    {
        SimulatedDevice.RequireSimulated();
        using OtherProcess process = OtherProcess.Run($"{nameof(ContextTests)}.{test}", (DevicesVariable, "2"));
        await process.Succeeded();
    }

    private static nint Current()
    {
        Driver.cuCtxGetCurrent(out nint context).ThrowIfFailed();
        return context;
    }

    /// <summary>
    /// The results of four steps of a token, three with collected launches and one without, with an action between them and between their
    /// calls.
    /// </summary>
    private static float[][] Steps(Action between)
    {
        using CudaBackend backend = new();
        Bench bench = new(backend);
        Weight table = bench.Weight(8, 32), weight = bench.Weight(48, 32);
        Tensor input = backend.AllocateTensor(1, 32), output = backend.AllocateTensor(1, 48);
        List<float[]> results = [];
        for (int i = 0; i < 4; i++)
        {
            StepLayout step = Bench.Step(1, 1, _ => (0, 1), (_, _) => 0);
            step.TokenIds[0] = i;
            if (i < 3)
                (step.OutputCount, step.QueryCount, step.OutputRows[0], step.Queries[0]) = (1, 1, 0, Bench.Query(0));
            between();
            backend.BeginStep(step);
            backend.Embed(table, input);
            backend.MatMul(input, weight, null, output, 1);
            if (i < 3)
                backend.Sample(output, 0, 1);
            between();
            backend.FinishStep(step);
            between();
            results.Add(Bench.Read(output, 1));
            between();
            backend.WriteWeight(weight, 0, new byte[4 * 32], DType.Float32);
        }

        between();
        return [.. results];
    }
}
