namespace Rollout.Client;

/// <summary>
/// Pushes new weights into a running sidecar, again and again: keeps the layout of the tensors and the shared memory from push to push.
/// One push at a time; a second one waits.
/// </summary>
/// <remarks>
/// <code>
/// await using var publisher = new WeightPublisher(client);
/// PushResult pushed = await publisher.PushAsync(tensors);   // after every learning step
/// </code>
/// </remarks>
public sealed class WeightPublisher : IAsyncDisposable
{
    private readonly RolloutClient _client;
    private readonly SemaphoreSlim _oneAtATime = new(1, 1);
    private PayloadLayout? _layout;
    private SharedMemoryFile? _file;
    private ulong? _served;
    private bool _disposed;

    /// <param name="client">Stays the caller's to dispose.</param>
    public WeightPublisher(RolloutClient client)
    {
        ArgumentNullException.ThrowIfNull(client);
        _client = client;
    }

    /// <summary>How long to ask a sidecar that broke off during a commit whether it committed.</summary>
    internal TimeSpan ResolveWithin { get; init; } = TimeSpan.FromSeconds(10);

    /// <summary>Makes these tensors the weights the next token is drawn from: all of them or none.</summary>
    /// <param name="tensors">
    /// Full tensors under the Hugging Face checkpoint's names; read during the call only. The sidecar says which are missing.
    /// </param>
    /// <param name="newVersion">Must be greater than the version they replace; null: one more than it.</param>
    /// <remarks>
    /// <para>
    /// The version they replace is compared and set: the sidecar refuses the update where it serves another. It is
    /// <see cref="PushOptions.BaseVersion"/> or else the version this publisher pushed last, so that a second trainer pushing to the same
    /// sidecar is found out; the first push, and one after a push that failed, asks the sidecar what it serves.
    /// </para>
    /// <para>
    /// Cancelling, a failing tensor copy and the timeout leave the old weights served, until the commit has been sent: then only the
    /// timeout counts. If the connection breaks after that, the sidecar is asked which version it serves.
    /// </para>
    /// </remarks>
    /// <exception cref="WeightUpdateRejectedException">Names, shapes, types or versions are wrong; lists everything found.</exception>
    /// <exception cref="WeightUpdateFailedException">
    /// It was begun and did not end well; <see cref="WeightUpdateFailedException.Outcome"/> says which weights are served.
    /// </exception>
    /// <exception cref="IOException">/dev/shm has no room.</exception>
    /// <exception cref="RolloutException">The sidecar cannot be asked for its version.</exception>
    public async Task<PushResult> PushAsync(
        IReadOnlyList<TensorSource> tensors,
        ulong? newVersion = null,
        PushOptions? options = null,
        CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(tensors);
        options ??= PushOptions.Default;
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(options.Timeout, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfLessThan(options.Parallelism, 1);
        await _oneAtATime.WaitAsync(cancellationToken);
        try
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            if (_layout is null || !_layout.Fits(tensors))
                _layout = PayloadLayout.Of(tensors);

            DateTime deadline = DateTime.UtcNow + options.Timeout;
            ulong baseVersion = options.BaseVersion ?? _served ?? await ServedAsync(options.Timeout, cancellationToken);
            // Until this push has ended well it is not known what is served.
            _served = null;
            var push = new WeightPush(_client, _layout, tensors, options, SharedMemory)
            {
                BaseVersion = baseVersion,
                NewVersion = newVersion ?? checked(baseVersion + 1),
                Deadline = deadline,
                ResolveWithin = ResolveWithin,
            };
            PushResult result = await push.RunAsync(cancellationToken);
            _served = result.Version;
            return result;
        }
        finally
        {
            _oneAtATime.Release();
        }
    }

    /// <summary>Waits for a push under way, then gives the shared memory back.</summary>
    public async ValueTask DisposeAsync()
    {
        await _oneAtATime.WaitAsync();
        _disposed = true;
        _file?.Dispose();
        _file = null;
        _oneAtATime.Release();
    }

    private async Task<ulong> ServedAsync(TimeSpan timeout, CancellationToken cancellationToken)
    {
        TimeSpan wait = timeout < RolloutClient.DefaultControlTimeout ? timeout : RolloutClient.DefaultControlTimeout;
        return (await _client.StatusAsync(wait, cancellationToken)).Version;
    }

    private SharedMemoryFile SharedMemory(long bytes)
    {
        if (_file is null || _file.Capacity < bytes || !_file.Exists)
        {
            // First give back the old one: there may not be room for both.
            _file?.Dispose();
            _file = null;
            _file = SharedMemoryFile.Create(bytes);
        }

        return _file;
    }
}
