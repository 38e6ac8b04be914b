using Rollout.Native;

namespace Rollout.Server.Weights;

/// <summary>
/// The shared memory for updates, a segment for each part of one: kept and mapped from update to update, so that reading it costs no copy
/// and no page fault. Lent to one update at a time: the one in progress.
/// </summary>
internal sealed class SharedSegment : IDisposable
{
    private const long LeastBytes = 16 << 20;

    private readonly Lock _lock = new();
    private readonly Dictionary<int, SealedMemory> _memory = []; // by part
    private readonly HashSet<int> _lent = [];

    /// <summary>Lends memory of this many bytes, or fewer where the machine has too few; null where it cannot be allocated.</summary>
    /// <param name="part">Of the update.</param>
    /// <param name="bytes">Bytes requested.</param>
    /// <param name="available">Bytes that the machine has free.</param>
    public SealedMemory? Lend(int part, ulong bytes, Func<long> available)
    {
        lock (_lock)
        {
            if (bytes == 0 || _lent.Contains(part)) return null;
            _memory.TryGetValue(part, out SealedMemory? memory);
            if (memory is null || (ulong)memory.Bytes < bytes)
            {
                // At most half of the free memory: other processes need some, and a smaller segment, used as a ring, costs little.
                ulong most = (ulong)Math.Max(LeastBytes, available() / 2);
                ulong now = (ulong)(memory?.Bytes ?? 0);
                if (Math.Min(bytes, most) > now)
                {
                    memory?.Dispose();
                    _memory.Remove(part);
                    memory = SealedMemory.TryCreate((long)Math.Min(bytes, most));
                    if (memory is not null) _memory.Add(part, memory);
                }
            }

            if (memory is not null) _lent.Add(part);
            return memory;
        }
    }

    public void GiveBack(int part)
    {
        lock (_lock) _lent.Remove(part);
    }

    /// <summary>Frees the memory, unless an update is using it.</summary>
    public void Discard()
    {
        lock (_lock)
        {
            if (_lent.Count > 0) return;
            foreach (SealedMemory memory in _memory.Values) memory.Dispose();
            _memory.Clear();
        }
    }

    public void Dispose() => Discard();
}
