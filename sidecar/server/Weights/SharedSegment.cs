using Rollout.Native;

namespace Rollout.Server.Weights;

/// <summary>
/// The single segment of shared memory for updates, kept and mapped from update to update, so that reading it costs no copy and no page
/// fault. Lent to one update at a time: the one in progress.
/// </summary>
internal sealed class SharedSegment : IDisposable
{
    private const long LeastBytes = 16 << 20;

    private readonly Lock _lock = new();
    private SealedMemory? _memory;
    private bool _lent;

    /// <summary>Lends memory of this many bytes, or fewer where the machine has too few; null where it cannot be allocated.</summary>
    /// <param name="bytes">Bytes requested.</param>
    /// <param name="available">Bytes that the machine has free.</param>
    public SealedMemory? Lend(ulong bytes, Func<long> available)
    {
        lock (_lock)
        {
            if (_lent || bytes == 0) return null;
            if (_memory is null || (ulong)_memory.Bytes < bytes)
            {
                // At most half of the free memory: other processes need some, and a smaller segment, used as a ring, costs little.
                ulong most = (ulong)Math.Max(LeastBytes, available() / 2);
                ulong now = (ulong)(_memory?.Bytes ?? 0);
                if (Math.Min(bytes, most) > now)
                {
                    _memory?.Dispose();
                    _memory = SealedMemory.TryCreate((long)Math.Min(bytes, most));
                }
            }

            _lent = _memory is not null;
            return _memory;
        }
    }

    public void GiveBack()
    {
        lock (_lock) _lent = false;
    }

    /// <summary>Frees the memory, unless an update is using it.</summary>
    public void Discard()
    {
        lock (_lock)
        {
            if (_lent) return;
            _memory?.Dispose();
            _memory = null;
        }
    }

    public void Dispose() => Discard();
}
