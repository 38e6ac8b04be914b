using Rollout.Native;

namespace Rollout.Server.Weights;

/// <summary>
/// The one segment of shared memory that updates come through, kept from update to update and mapped all the time: reading it costs no
/// copy and no page fault. Lent to one update at a time, the one that holds the engine's seat.
/// </summary>
internal sealed class SharedSegment : IDisposable
{
    private const long LeastBytes = 16 << 20;

    private readonly Lock _lock = new();
    private SealedMemory? _memory;
    private bool _lent;

    /// <summary>Memory of so many bytes, or of fewer where the machine is short of them; null where there is none to be had.</summary>
    /// <param name="bytes">Asked for.</param>
    /// <param name="available">That the machine has.</param>
    public SealedMemory? Lend(ulong bytes, Func<long> available)
    {
        lock (_lock)
        {
            if (_lent || bytes == 0) return null;
            if (_memory is null || (ulong)_memory.Bytes < bytes)
            {
                // Half of what there is: the machine has others to think of, and going round in a smaller one costs little.
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

    /// <summary>Gives the memory to the machine, unless an update is using it.</summary>
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
