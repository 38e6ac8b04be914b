namespace Rollout.Kernels.Cuda;

/// <summary>
/// Device time by kernel: an event before and one after every launch on the stream of steps. When the host is late with a launch, the time
/// that the device waited for it is counted, so the stream should have work queued ahead of what is measured.
/// </summary>
internal sealed class CudaLaunchTimes(CudaDevice device) : IDisposable
{
    private readonly List<(CudaEvent Before, CudaEvent After)> _events = [];
    private readonly List<string> _names = []; // of the launches so far

    /// <summary>Call before launching a kernel, or a matmul with its shape.</summary>
    public void Before(string name)
    {
        if (_names.Count == _events.Count)
            _events.Add((device.CreateEvent(timed: true), device.CreateEvent(timed: true)));
        _events[_names.Count].Before.Record(device.Stream);
        _names.Add(name);
    }

    /// <summary>Call after the launch.</summary>
    public void After() => _events[_names.Count - 1].After.Record(device.Stream);

    /// <summary>Launches and seconds by name, in the order of first launches. Waits for them, and resets.</summary>
    public IReadOnlyList<(string Name, int Launches, double Seconds)> Take()
    {
        device.MakeCurrent();
        device.Stream.Synchronize();
        Dictionary<string, (int Launches, double Seconds)> times = [];
        for (int i = 0; i < _names.Count; i++)
        {
            (int launches, double seconds) = times.GetValueOrDefault(_names[i]);
            times[_names[i]] = (launches + 1, seconds + _events[i].After.SecondsSince(_events[i].Before));
        }

        _names.Clear();
        return [.. times.Select(entry => (entry.Key, entry.Value.Launches, entry.Value.Seconds))];
    }

    public void Dispose()
    {
        foreach ((CudaEvent before, CudaEvent after) in _events)
        {
            before.Dispose();
            after.Dispose();
        }
    }
}
