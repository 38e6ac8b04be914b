namespace Rollout.Engine;

/// <summary>
/// A part of an update's payload, which <see cref="UpdatePart.ReadFromAsync"/> reads. There is a subclass for each kind of memory; it
/// determines how the bytes are read, and by how many threads.
/// </summary>
/// <param name="payloadOffset">Offset of its first byte in the payload.</param>
/// <param name="bytes">Its length.</param>
/// <param name="owner">Owner of the memory, disposed with the source. Null where the memory outlives the source.</param>
public abstract class PayloadSource(long payloadOffset, long bytes, IDisposable? owner) : IDisposable
{
    public long PayloadOffset { get; } = payloadOffset;

    public long Bytes { get; } = bytes;

    public void Dispose() => owner?.Dispose();

    /// <summary>
    /// Checks what can be checked before a byte is written, and waits for the bytes: until then an update in place does no harm.
    /// </summary>
    /// <inheritdoc cref="ReadAsync"/>
    internal virtual Task PrepareAsync(PayloadCursor cursor, CancellationToken cancellation) => Task.CompletedTask;

    /// <summary>Passes all its bytes to the tensors they belong to, and advances the cursor past them.</summary>
    /// <param name="cursor">Positioned at its first byte; the payload has at least its length left.</param>
    /// <param name="cancellation">Stops the read half-way.</param>
    /// <exception cref="UpdateFailedException">Bytes are missing, or are not what the manifest says.</exception>
    /// <exception cref="IOException">Bytes cannot be read.</exception>
    internal abstract Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation);
}
