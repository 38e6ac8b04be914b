using Rollout.Kernels.Cuda;
using Rollout.Native;

namespace Rollout.Gpu;

/// <summary>Time on the device, measured with its events.</summary>
internal static class DeviceClock
{
    /// <summary>
    /// Seconds of one call of <paramref name="work"/>, which queues on the stream of steps: the median of several rounds of several calls
    /// each.
    /// </summary>
    public static double Seconds(CudaDevice device, int rounds, int calls, Action work)
    {
        device.MakeCurrent();
        using CudaEvent before = device.CreateEvent(timed: true), after = device.CreateEvent(timed: true);
        double[] seconds = new double[rounds];
        for (int round = -1; round < rounds; round++)
        {
            before.Record(device.Stream);
            for (int i = 0; i < calls; i++) work();
            after.Record(device.Stream);
            after.Synchronize();
            if (round >= 0) seconds[round] = after.SecondsSince(before) / calls;
        }

        Array.Sort(seconds);
        return seconds[rounds / 2];
    }

    /// <summary>Bytes read and written a second by copies on the device.</summary>
    public static double CopyRate(CudaDevice device, long bytes)
    {
        using DeviceBuffer source = device.AllocateZeroed(bytes), destination = device.Allocate(bytes);
        return 2.0 * bytes / Seconds(device, 5, 5, () => Copy(device, source, destination));
    }

    public static void Copy(CudaDevice device, DeviceBuffer source, DeviceBuffer destination)
        => Driver.cuMemcpyDtoDAsync_v2(destination.Pointer, source.Pointer, (nuint)source.Bytes, device.Stream.Value)
            .ThrowIfFailed(source.Bytes);
}
