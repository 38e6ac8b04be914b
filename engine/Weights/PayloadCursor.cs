namespace Rollout.Engine;

/// <summary>A place in the payload, moving on through its tensors and the alignment gaps between them.</summary>
internal sealed class PayloadCursor(IReadOnlyList<IncomingTensor> tensors, int first, long position)
{
    private int _current = first;

    /// <summary>The next payload byte.</summary>
    public long Position { get; private set; } = position;

    /// <summary>The tensor that byte belongs to, or that comes next; null behind the last.</summary>
    public IncomingTensor? Tensor => _current < tensors.Count ? tensors[_current] : null;

    /// <summary>Hands the next bytes to the tensors they belong to.</summary>
    public void Take(ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            if (Tensor is not { } tensor)
            {
                Position += bytes.Length;
                return;
            }

            int gap = (int)Math.Min(bytes.Length, tensor.Start + tensor.Taken - Position);
            ReadOnlySpan<byte> own = bytes.Slice(gap, (int)Math.Min(bytes.Length - gap, tensor.Bytes - tensor.Taken));
            tensor.Take(own);
            Position += gap + own.Length;
            bytes = bytes[(gap + own.Length)..];
            if (tensor.Taken == tensor.Bytes) _current++;
        }
    }

    /// <summary>Goes to where others have taken everything before.</summary>
    public void MoveTo(long position)
    {
        Position = position;
        while (Tensor is { } tensor && tensor.Taken == tensor.Bytes) _current++;
    }
}
