using Grpc.Core;

namespace Rollout.Client;

/// <summary>
/// Pushes new weights into a running sidecar. Keeps the layout of the tensors and the shared memory from push to push. Pushes run one at a
/// time; a second one waits.
/// </summary>
/// <remarks>
/// <code>
/// await using var publisher = new WeightPublisher(client);
/// PushResult pushed = await publisher.PushAsync(tensors);   // after every learning step
/// </code>
/// </remarks>
public sealed class WeightPublisher : IAsyncDisposable
{
    // With less shared memory a ring is not worthwhile: the error then says what to do.
    private const long LeastRing = 4 << 20;

    private static readonly TimeSpan s_releaseWithin = TimeSpan.FromSeconds(5);

    private readonly RolloutClient _client;
    private readonly SemaphoreSlim _oneAtATime = new(1, 1);
    private PayloadLayout? _layout;
    private PayloadFile? _file; // where the sidecar's own memory cannot be reached
    private long _fileFor; // the payload it was made for; the file may be smaller
    private ulong? _served;
    private bool _hostNeeded; // by the last push
    private bool _usedDevice; // by any push
    private bool _disposed;

    /// <param name="client">Not disposed with the publisher.</param>
    public WeightPublisher(RolloutClient client)
    {
        ArgumentNullException.ThrowIfNull(client);
        _client = client;
    }

    /// <summary>How long to keep asking, after the connection broke during a commit, whether the sidecar committed.</summary>
    internal TimeSpan ResolveWithin { get; init; } = TimeSpan.FromSeconds(10);

    /// <summary>
    /// Most bytes of shared memory to use; null: as many as a push has, if the machine has them free. A larger push reuses the memory as a
    /// ring.
    /// </summary>
    public long? MaxSharedMemoryBytes { get; init; }

    /// <summary>Sends tensors that are in a GPU's memory; kept from push to push, and disposed with the publisher.</summary>
    internal IDeviceSender? Device { get; set; }

    /// <summary>Makes these tensors the weights the next token is drawn from: all of them or none.</summary>
    /// <param name="tensors">
    /// Full tensors under the Hugging Face checkpoint's names; read during the call only. The sidecar reports missing ones.
    /// </param>
    /// <param name="newVersion">Must be greater than the version they replace; null: one more than it.</param>
    /// <remarks>
    /// <para>
    /// The version they replace is compared and set: the sidecar refuses the update where it serves another. It is
    /// <see cref="PushOptions.BaseVersion"/> or else the version this publisher pushed last, so that a push by a second trainer is
    /// detected; the first push, and one after a failed push, asks the sidecar for the version it serves.
    /// </para>
    /// <para>
    /// Until the commit is sent, cancelling, a failing tensor copy and the timeout leave the old weights served (in place, the sidecar
    /// poisoned). After that only the timeout applies, and if the connection breaks, the sidecar is asked which version it serves.
    /// </para>
    /// </remarks>
    /// <exception cref="WeightUpdateRejectedException">Names, shapes, types or versions are wrong; lists everything found.</exception>
    /// <exception cref="WeightUpdateFailedException">
    /// It began and did not succeed; <see cref="WeightUpdateFailedException.Outcome"/> says which weights are served.
    /// </exception>
    /// <exception cref="IOException">/dev/shm has no room.</exception>
    /// <exception cref="RolloutException">The sidecar cannot be asked for its version.</exception>
    public Task<PushResult> PushAsync(
        IReadOnlyList<TensorSource> tensors,
        ulong? newVersion = null,
        PushOptions? options = null,
        CancellationToken cancellationToken = default)
        => PushFromAsync(tensors, device: null, mayCopy: true, newVersion, options, cancellationToken);

    /// <summary>
    /// Makes tensors that are in a GPU's memory, of any framework, the weights the next token is drawn from. They do not pass through the
    /// host: a sidecar on the same GPU reads them there (CUDA IPC), to one on another they are broadcast (NCCL).
    /// </summary>
    /// <param name="tensors">Full tensors, all on one GPU.</param>
    /// <param name="stream">The CUDA stream (CUstream or cudaStream_t) that has written them; 0: the legacy default stream.</param>
    /// <param name="newVersion">As for tensors of the host.</param>
    /// <param name="options">Policy, timeout.</param>
    /// <param name="cancellationToken">Until the commit is sent, cancelling leaves the old weights served.</param>
    /// <exception cref="InvalidOperationException">The sidecar cannot be reached from the GPU that has the tensors.</exception>
    public Task<PushResult> PushAsync(
        IReadOnlyList<DeviceTensor> tensors,
        nint stream = 0,
        ulong? newVersion = null,
        PushOptions? options = null,
        CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(tensors);
        TensorSource[] sources = [.. tensors.Select(tensor => new TensorSource(tensor.Name, tensor.DType, tensor.Shape,
            (_, _) => throw new InvalidOperationException($"'{tensor.Name}' is in a GPU's memory")))];
        return PushFromAsync(sources, () => Sender(tensors, stream), mayCopy: false, newVersion, options, cancellationToken);
    }

    /// <summary>Sends these tensors; the same for all pushes.</summary>
    internal IDeviceSender Sender(IReadOnlyList<DeviceTensor> tensors, nint stream)
    {
        CudaSender sender = (CudaSender)(Device ??= new CudaSender());
        sender.Use(tensors, stream);
        return sender;
    }

    /// <summary>As the public methods, of tensors that are in a GPU's memory.</summary>
    /// <param name="tensors">How to copy them to the host, where that is needed.</param>
    /// <param name="mayCopy">Whether they may be copied to the host, where the sidecar cannot be reached from the device.</param>
    /// <param name="device">What sends them from where they are, called when it is this push's turn; null: they are on the host.</param>
    internal async Task<PushResult> PushFromAsync(
        IReadOnlyList<TensorSource> tensors,
        Func<IDeviceSender>? device,
        bool mayCopy,
        ulong? newVersion,
        PushOptions? options,
        CancellationToken cancellationToken)
    {
        ArgumentNullException.ThrowIfNull(tensors);
        options ??= PushOptions.Default;
        if (device is null && options.Transport is PushTransport.CudaIpc or PushTransport.Nccl)
        {
            throw new ArgumentException(
                $"{options.Transport} needs tensors in a GPU's memory, and these are in the host's", nameof(options));
        }

        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(options.Timeout, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfLessThan(options.Parallelism, 1);
        if (options.Transport == PushTransport.File)
            CheckFile(tensors, options);
        await _oneAtATime.WaitAsync(cancellationToken);
        try
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            // A safetensors file has no room between tensors.
            int alignment = options.Transport == PushTransport.File ? 1 : PayloadLayout.Alignment;
            if (_layout is null || !_layout.Fits(tensors, alignment))
                _layout = PayloadLayout.Of(tensors, alignment);

            DateTime deadline = DateTime.UtcNow + options.Timeout;
            ulong baseVersion = options.BaseVersion ?? _served ?? await ServedAsync(options.Timeout, cancellationToken);
            // Until this push has succeeded it is not known what is served.
            _served = null;
            bool onDevice = device is not null && options.Transport is PushTransport.Auto or PushTransport.CudaIpc or PushTransport.Nccl;
            IPayloadSender? host = mayCopy ? HostSender(options, _layout) : null;
            using FileSender? file = host as FileSender;
            IPayloadSender sender = onDevice ? new DeviceFirstSender(device!(), _layout, options.Transport, host) : host!;
            WeightPush push = new(_client, _layout, tensors, options, sender)
            {
                BaseVersion = baseVersion,
                NewVersion = newVersion ?? checked(baseVersion + 1),
                Deadline = deadline,
                ResolveWithin = ResolveWithin,
                // Not before it is known that the device does not do.
                SegmentBytes = host is SharedMemorySender && (!onDevice || _hostNeeded) ? SharedBytes(_layout.PayloadBytes) : 0,
            };
            PushResult result;
            try
            {
                result = await push.RunAsync(cancellationToken);
            }
            catch
            {
                Device?.Disconnect();
                throw;
            }

            _hostNeeded = result.Transport == PushTransport.SharedMemory;
            _usedDevice |= result.Transport is PushTransport.CudaIpc or PushTransport.Nccl;
            _served = result.Version;
            return result;
        }
        finally
        {
            _oneAtATime.Release();
        }
    }

    /// <summary>Waits for a push in progress, then frees the shared memory.</summary>
    public async ValueTask DisposeAsync()
    {
        await _oneAtATime.WaitAsync();
        _disposed = true;
        _file?.Dispose();
        _file = null;
        if (_usedDevice) await ReleaseAsync();
        Device?.Dispose();
        Device = null;
        _oneAtATime.Release();
    }

    /// <summary>Lets the sidecar close what it has opened of this process's memory, so that it can be freed.</summary>
    private async Task ReleaseAsync()
    {
        try
        {
            await _client.Weights.ReleaseMemoryAsync(new V1.ReleaseMemoryRequest(), deadline: DateTime.UtcNow + s_releaseWithin);
        }
        catch (RpcException)
        {
            // It is gone, and its mappings with it; or it closes them when the connection ends.
        }
    }

    private async Task<ulong> ServedAsync(TimeSpan timeout, CancellationToken cancellationToken)
    {
        TimeSpan wait = timeout < RolloutClient.DefaultControlTimeout ? timeout : RolloutClient.DefaultControlTimeout;
        return (await _client.StatusAsync(wait, cancellationToken)).Version;
    }

    private IPayloadSender? HostSender(PushOptions options, PayloadLayout layout) => options.Transport switch
    {
        PushTransport.Auto or PushTransport.SharedMemory =>
            new SharedMemorySender(SharedBytes(layout.PayloadBytes), () => OwnSharedMemory(layout.PayloadBytes), options.Parallelism),
        PushTransport.Inline => new InlineSender(),
        PushTransport.File => new FileSender(layout, options.Folder!, options.Parallelism),
        PushTransport.CudaIpc or PushTransport.Nccl => null,
        _ => throw new ArgumentException($"unknown transport {options.Transport}"),
    };

    private static void CheckFile(IReadOnlyList<TensorSource> tensors, PushOptions options)
    {
        if (string.IsNullOrEmpty(options.Folder))
        {
            throw new ArgumentException(
                $"{nameof(PushTransport)}.{nameof(PushTransport.File)} needs a {nameof(PushOptions.Folder)}", nameof(options));
        }

        string[] several = [.. tensors.GroupBy(tensor => tensor.Name).Where(same => same.Count() > 1).Select(same => same.Key)];
        if (several.Length > 0)
        {
            throw new ArgumentException(
                $"a safetensors file holds one slice of a tensor, these have several: {string.Join(", ", several)}", nameof(tensors));
        }

        string[] sparse = [.. tensors.Where(tensor => tensor.SparseCount is not null).Select(tensor => tensor.Name)];
        if (sparse.Length > 0)
        {
            throw new ArgumentException(
                $"a safetensors file holds whole tensors, these are sparse: {string.Join(", ", sparse)}", nameof(tensors));
        }
    }

    private long SharedBytes(long payload) => Math.Clamp(payload, 1, MaxSharedMemoryBytes ?? long.MaxValue);

    private PayloadFile OwnSharedMemory(long payload)
    {
        if (_file is not null && _fileFor >= payload && _file.Exists)
            return _file;

        // Free the old one first: there may not be room for both.
        _file?.Dispose();
        _file = null;
        long wanted = SharedBytes(payload);
        long free = PayloadFile.FreeBytes(PayloadFile.DefaultFolder);
        _file = PayloadFile.Create(wanted > free && free >= LeastRing ? free / 4 * 3 : wanted);
        _fileFor = payload;
        return _file;
    }
}
