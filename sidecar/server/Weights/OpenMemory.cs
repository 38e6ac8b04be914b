using Google.Protobuf;
using Microsoft.AspNetCore.Connections.Features;
using Microsoft.AspNetCore.Http.Features;
using Rollout.Kernels.Cuda;

namespace Rollout.Server.Weights;

/// <summary>
/// The allocations of other processes that updates over one connection have opened: each once, however many updates read it. Closed when
/// the client asks for it, or with the connection, which also ends when the client's process is killed.
/// </summary>
internal sealed class OpenMemory : IDisposable
{
    private readonly Lock _lock = new();
    private readonly Dictionary<ByteString, DeviceBytes> _opened = [];
    private bool _disposed;

    /// <summary>What this connection receives from other devices by.</summary>
    public OpenRanks Ranks { get; } = new();

    /// <summary>That of the request's connection.</summary>
    public static OpenMemory Of(HttpContext request)
    {
        IDictionary<object, object?> items = request.Features.GetRequiredFeature<IConnectionItemsFeature>().Items;
        lock (items)
        {
            if (items.TryGetValue(typeof(OpenMemory), out object? found)) return (OpenMemory)found!;
            OpenMemory memory = new();
            items[typeof(OpenMemory)] = memory;
            CancellationToken closed = request.Features.GetRequiredFeature<IConnectionLifetimeFeature>().ConnectionClosed;
            closed.UnsafeRegister(opened => ((OpenMemory)opened!).Dispose(), memory);
            return memory;
        }
    }

    /// <param name="peers">The backend's.</param>
    /// <param name="handle">cuIpcMemHandle.</param>
    /// <param name="opened">Whether it has been opened now.</param>
    /// <exception cref="Native.CudaException">It cannot be opened.</exception>
    public DeviceBytes Open(CudaPeers peers, ByteString handle, out bool opened)
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            opened = !_opened.TryGetValue(handle, out DeviceBytes? memory);
            if (memory is null) _opened.Add(handle, memory = peers.Open(handle.Span));
            return memory;
        }
    }

    /// <summary>
    /// Closes all of it, and leaves the group of ranks. What an operation reads is closed when that ends. Returns the number of
    /// allocations.
    /// </summary>
    public int Release()
    {
        Ranks.Leave();
        lock (_lock)
        {
            int count = _opened.Count;
            foreach (DeviceBytes memory in _opened.Values) memory.Dispose();
            _opened.Clear();
            return count;
        }
    }

    public void Dispose()
    {
        lock (_lock) _disposed = true;
        Release();
        Ranks.Dispose();
    }
}
