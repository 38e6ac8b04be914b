namespace Rollout.Engine;

/// <summary>
/// A part of an update's payload, wherever its bytes lie: <see cref="WeightUpdate.ReadFromAsync"/> takes them. A subclass a place: it knows
/// how they are read, and by how many threads.
/// </summary>
/// <param name="payloadOffset">The payload byte that is its first.</param>
/// <param name="bytes">How many it has.</param>
/// <param name="owner">Of the place; disposed with the source. Null where the place outlives it.</param>
public abstract class PayloadSource(long payloadOffset, long bytes, IDisposable? owner) : IDisposable
{
    public long PayloadOffset { get; } = payloadOffset;

    public long Bytes { get; } = bytes;

    public void Dispose() => owner?.Dispose();

    /// <summary>Hands all its bytes to the tensors they belong to, and moves the cursor behind them.</summary>
    /// <param name="cursor">At its first byte; the payload has as many bytes from there.</param>
    /// <param name="cancellation">Ends it half-way.</param>
    /// <exception cref="UpdateFailedException">Bytes are missing, or are not what the manifest says.</exception>
    /// <exception cref="IOException">Bytes cannot be read.</exception>
    internal abstract Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation);
}
