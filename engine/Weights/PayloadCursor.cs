namespace Rollout.Engine;

/// <summary>A position in the payload that advances through its tensors' ranges and the alignment gaps between them.</summary>
internal sealed class PayloadCursor(IReadOnlyList<IncomingRange> ranges, int first, long position)
{
    /// <summary>Fits a core's L2 cache together with the packed result.</summary>
    public const int MostPieceBytes = 512 * 1024;

    private int _current = first;

    /// <summary>The next payload byte.</summary>
    public long Position { get; private set; } = position;

    /// <summary>The range that byte belongs to, or else the next one; null after the last.</summary>
    public IncomingRange? Range => _current < ranges.Count ? ranges[_current] : null;

    /// <summary>
    /// How many bytes before <paramref name="end"/> to take next: several small tensors, or whole units of a large one.
    /// </summary>
    public int PieceBytes(long end)
    {
        long left = end - Position;
        return left <= MostPieceBytes ? (int)left : Range!.PieceBytes(MostPieceBytes);
    }

    /// <summary>Passes the next bytes to the tensors they belong to.</summary>
    public void Take(ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            if (Range is not { } range)
            {
                Position += bytes.Length;
                return;
            }

            int gap = (int)Math.Min(bytes.Length, range.Start + range.Taken - Position);
            ReadOnlySpan<byte> own = bytes.Slice(gap, (int)Math.Min(bytes.Length - gap, range.Bytes - range.Taken));
            range.Take(own);
            Position += gap + own.Length;
            bytes = bytes[(gap + own.Length)..];
            if (range.Taken == range.Bytes) _current++;
        }
    }

    /// <summary>
    /// What the ranges still lack of the bytes before <paramref name="end"/>, in order: how many of each, from its next one on.
    /// </summary>
    public IEnumerable<(IncomingRange Range, long Bytes)> Left(long end)
    {
        for (int i = _current; i < ranges.Count && ranges[i].Start < end; i++)
        {
            long bytes = Math.Min(end - ranges[i].Start, ranges[i].Bytes) - ranges[i].Taken;
            if (bytes > 0) yield return (ranges[i], bytes);
        }
    }

    /// <summary>Advances, once the ranges have taken all bytes before that.</summary>
    public void MoveTo(long end)
    {
        Position = end;
        SkipComplete();
    }

    /// <summary>
    /// Takes all bytes before <paramref name="end"/>, on all cores. A pool thread waits for them and not the caller's, which may serve a
    /// connection.
    /// </summary>
    /// <param name="end">A payload byte.</param>
    /// <param name="read">Takes, on one core, the bytes from a cursor up to a payload byte.</param>
    public Task TakeOnAllCoresAsync(long end, Action<PayloadCursor, long> read)
        => Task.Run(() => TakeOnAllCores(end, read), CancellationToken.None);

    private void TakeOnAllCores(long end, Action<PayloadCursor, long> read)
    {
        SkipComplete();
        // Largest first, so that the cores finish together.
        Lot[] lots = [.. Lots(end).OrderByDescending(lot => lot.End - lot.Cursor.Position)];
        AllCores.ForEach(lots, lot => read(lot.Cursor, lot.End));
        MoveTo(end);
    }

    /// <summary>A part of the payload that one core reads from its first byte to its last.</summary>
    private readonly record struct Lot(PayloadCursor Cursor, long End);

    /// <summary>All bytes before <paramref name="end"/>, cut between ranges into lots of a few small ones or of a large one.</summary>
    private IEnumerable<Lot> Lots(long end)
    {
        int first = _current;
        while (first < ranges.Count && ranges[first].Start < end)
        {
            long start = ranges[first].Start + ranges[first].Taken;
            int next = first + 1;
            while (next < ranges.Count && ranges[next].Start + ranges[next].Bytes - start <= MostPieceBytes) next++;
            long lotEnd = ranges[next - 1].Start + ranges[next - 1].Bytes;
            yield return new Lot(new PayloadCursor(ranges, first, start), Math.Min(end, lotEnd));
            first = next;
        }
    }

    private void SkipComplete()
    {
        while (Range is { } range && range.Taken == range.Bytes) _current++;
    }
}
