using System.Reflection;
using CsCheck;
using Rollout.Kernels.Tests.Cuda;
using Rollout.Native;
using Xunit;

namespace Rollout.Client.Tests;

/// <summary>
/// Pushing tensors that are in device memory to a real sidecar on the same device, a simulated one: nothing passes through the host, and
/// what is served equals a push through it.
/// </summary>
public sealed class CudaPushTests : IAsyncLifetime
{
    private const string NoIpc = "the sidecar runs on a CPU";

    private static readonly int[] s_prompt = [5, 6, 7, 8];
    private static readonly GenerateOptions s_sampled = new() { MaxTokens = 12, N = 2, Seed = 5, IgnoreEos = true };

    private readonly List<IDisposable> _memory = []; // of the device
    private CudaContext? _context;
    private SidecarProcess? _sidecar;
    private RolloutClient _client = null!;

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    public ValueTask InitializeAsync() => ValueTask.CompletedTask;

    public async ValueTask DisposeAsync()
    {
        if (_sidecar is not null)
        {
            await _client.DisposeAsync();
            await _sidecar.DisposeAsync();
        }

        foreach (IDisposable memory in _memory)
            memory.Dispose();
        _context?.Dispose();
    }

    [Theory]
    [InlineData(UpdateMode.Staged, 0)]
    [InlineData(UpdateMode.InPlace, 0)]
    [InlineData(UpdateMode.Staged, 300_000)] // mapped memory, which cannot be shared: by buckets of this size
    [InlineData(UpdateMode.InPlace, 1 << 20)]
    public async Task What_is_served_equals_a_push_through_the_host(UpdateMode mode, long bucket)
    {
        await StartAsync("cuda");
        List<(TensorSource Source, byte[] Bytes)> tensors = Changed(GoldenTensors.Of("qwen3"));
        string original = await BitsAsync();
        await using WeightPublisher host = new(_client);
        PushResult sent = await host.PushAsync([.. tensors.Select(tensor => tensor.Source)], cancellationToken: Token);
        Assert.Equal((PushTransport.SharedMemory, "the tensors are in this machine's memory"), (sent.Transport, sent.TransportReason));
        string changed = await BitsAsync();
        Assert.NotEqual(original, changed);
        await host.PushAsync([.. GoldenTensors.Of("qwen3").Select(tensor => tensor.Source)], cancellationToken: Token);
        Assert.Equal(original, await BitsAsync());

        await using WeightPublisher publisher = new(_client);
        if (bucket > 0)
            publisher.Device = new CudaSender { MaxBucketBytes = bucket };
        DeviceTensor[] onDevice = Upload(tensors, shareable: bucket == 0);
        for (ulong version = 3; version < 6; version++)
        {
            PushResult pushed = await publisher.PushAsync(
                onDevice, options: new PushOptions { Mode = mode, BaseVersion = version - 1 }, cancellationToken: Token);
            Assert.Equal((version, PushTransport.CudaIpc, sent.Digest), (pushed.Version, pushed.Transport, pushed.Digest));
            Assert.Equal(bucket > 0, pushed.TransportReason.Contains("copied", StringComparison.Ordinal));
            PushCounts counts = pushed.Counts;
            Assert.Equal(
                (2 + counts.Buckets, (long)counts.Buckets, tensors.Sum(tensor => (long)tensor.Bytes.Length), 0L),
                (counts.Messages, counts.Launches, counts.DeviceBytes, counts.HostBytes));
            Assert.Equal(bucket is > 0 and < 1_000_000, counts.Buckets > 1);
            if (version > 3)
                Assert.Equal((0L, 0L, 0L), (counts.HandlesOpened, counts.DeviceAllocations, counts.GraphsCaptured));
            Assert.Equal(changed, await BitsAsync());
        }
    }

    /// <summary>The sidecar is on the second of two devices: NCCL, by a group that is joined once.</summary>
    [Theory]
    [InlineData(UpdateMode.Staged, 150_000)]
    [InlineData(UpdateMode.InPlace, 150_000)]
    [InlineData(UpdateMode.Staged, 256 << 20)]
    public async Task From_another_device_tensors_are_broadcast(UpdateMode mode, long bucket)
    {
        await StartAsync("cuda:1");
        List<(TensorSource Source, byte[] Bytes)> tensors = Changed(GoldenTensors.Of("qwen3"));
        string original = await BitsAsync();
        await using WeightPublisher host = new(_client);
        PushResult sent = await host.PushAsync([.. tensors.Select(tensor => tensor.Source)], cancellationToken: Token);
        string changed = await BitsAsync();
        Assert.NotEqual(original, changed);
        await host.PushAsync([.. GoldenTensors.Of("qwen3").Select(tensor => tensor.Source)], cancellationToken: Token);

        PushOptions options = new() { Mode = mode };
        await using (WeightPublisher publisher = new(_client) { Device = new CudaSender { MaxBucketBytes = bucket } })
        {
            DeviceTensor[] onDevice = Upload(tensors, shareable: true);
            for (ulong version = 3; version < 6; version++)
            {
                PushResult pushed = await publisher.PushAsync(onDevice, options: options, cancellationToken: Token);
                Assert.Equal((version, PushTransport.Nccl, sent.Digest), (pushed.Version, pushed.Transport, pushed.Digest));
                Assert.StartsWith("the tensors are on GPU-", pushed.TransportReason, StringComparison.Ordinal);
                PushCounts counts = pushed.Counts;
                Assert.Equal((3, (long)counts.Buckets, 0L), (counts.Messages, counts.Launches, counts.HostBytes));
                Assert.Equal((changed, 1), (await BitsAsync(), SimulatedDevice.Communicators));
                Assert.InRange((await _client.StatusAsync(cancellationToken: Token)).Memory.Nccl, 1, 1 << 20);
            }

            // The sidecar has left the group, as one that was restarted would have: a new one is joined.
            await _client.Weights.ReleaseMemoryAsync(new V1.ReleaseMemoryRequest(), cancellationToken: Token);
            Assert.Equal(0, (await _client.StatusAsync(cancellationToken: Token)).Memory.Nccl);
            Assert.Equal(6ul, (await publisher.PushAsync(onDevice, options: options, cancellationToken: Token)).Version);
            Assert.Equal(1, SimulatedDevice.Communicators);
            InvalidOperationException refused = await Assert.ThrowsAsync<InvalidOperationException>(() => publisher.PushAsync(
                onDevice, options: options with { Transport = PushTransport.CudaIpc }, cancellationToken: Token));
            Assert.StartsWith("CudaIpc cannot be used: the tensors are on GPU-", refused.Message, StringComparison.Ordinal);
        }

        Assert.Equal(0, SimulatedDevice.Communicators);
        Assert.Equal(changed, await BitsAsync());
    }

    /// <summary>A trainer whose sidecar dies, or stops, in the middle of a broadcast is not left waiting, and keeps nothing.</summary>
    [Theory]
    [InlineData("KILL")]
    [InlineData("STOP")]
    public async Task A_broadcast_ends_when_the_sidecar_is_gone(string signal)
    {
        await StartAsync("cuda:1");
        DeviceTensor[] onDevice = Upload(GoldenTensors.Of("qwen3"), shareable: true);
        int broadcasts = 0;
        await using WeightPublisher publisher = new(_client)
        {
            Device = new CudaSender
            {
                MaxBucketBytes = 150_000,
                BeforeBroadcast = i =>
                {
                    broadcasts++;
                    if (i == 2)
                        Signal(signal);
                },
            },
        };
        PushOptions options = new() { Timeout = TimeSpan.FromSeconds(3) };
        await Assert.ThrowsAnyAsync<RolloutException>(() => publisher.PushAsync(onDevice, options: options, cancellationToken: Token)
            .WaitAsync(TimeSpan.FromSeconds(20), Token));
        Assert.InRange(broadcasts, 3, 5);
        Assert.Equal(0, SimulatedDevice.Communicators);
        if (signal == "KILL")
            return;
        Signal("CONT");

        // The sidecar goes on, and serves what it did: it has noticed that the trainer gave up.
        for (SidecarStatus status = await _client.StatusAsync(cancellationToken: Token); status.Updating || status.Memory.Nccl > 0;)
        {
            await Task.Delay(20, Token);
            status = await _client.StatusAsync(cancellationToken: Token);
        }

        Assert.Equal(0ul, (await _client.StatusAsync(cancellationToken: Token)).Version);
        await BitsAsync();
    }

    private void Signal(string name)
    {
        using System.Diagnostics.Process kill = System.Diagnostics.Process.Start("kill", [$"-{name}", $"{_sidecar!.ProcessId}"]);
        kill.WaitForExit();
    }

    /// <summary>A trainer that computes in fp32 sends fp32; the sidecar rounds matrices as the trainer would, and keeps vectors.</summary>
    [Fact]
    public async Task Matrices_of_32_bits_are_rounded_by_the_sidecar()
    {
        await StartAsync("cuda");
        List<(TensorSource Source, byte[] Bytes)> tensors = GoldenTensors.Of("qwen3");
        string original = await BitsAsync();
        DeviceTensor[] wide = Upload([.. tensors.Select(tensor => (
            new TensorSource(tensor.Source.Name, TensorDType.F32, tensor.Source.Shape, (_, _) => { }),
            Widened(tensor.Bytes, tensor.Source.Shape.Count > 1)))], shareable: true);
        await using WeightPublisher publisher = new(_client);
        await publisher.PushAsync(wide, cancellationToken: Token);
        Assert.Equal(original, await BitsAsync());

        static byte[] Widened(byte[] bf16, bool addBits)
        {
            byte[] fp32 = new byte[bf16.Length * 2];
            for (int i = 0; i < bf16.Length; i += 2)
            {
                (fp32[2 * i + 2], fp32[2 * i + 3]) = (bf16[i], bf16[i + 1]);
                if (addBits)
                    fp32[2 * i + 1] = 0x20; // less than half of bf16's last bit
            }

            return fp32;
        }
    }

    [Fact]
    public async Task What_the_sidecar_has_opened_is_closed_with_the_publisher()
    {
        await StartAsync("cuda");
        DeviceTensor[] tensors = Upload(GoldenTensors.Of("qwen3"), shareable: true);
        int before = Mappings();
        await using (WeightPublisher publisher = new(_client))
        {
            await publisher.PushAsync(tensors, cancellationToken: Token);
            int open = Mappings();
            Assert.InRange(open - before, 1, int.MaxValue);
            await publisher.PushAsync(tensors, cancellationToken: Token);
            Assert.Equal(open, Mappings());
        }

        Assert.Equal(before, Mappings());
    }

    [Fact]
    public async Task A_sidecar_that_cannot_read_the_device_is_named()
    {
        await StartAsync("cpu");
        List<(TensorSource Source, byte[] Bytes)> tensors = GoldenTensors.Of("qwen3");
        DeviceTensor[] onDevice = Upload(tensors, shareable: true);
        await using WeightPublisher publisher = new(_client);
        InvalidOperationException refused = await Assert.ThrowsAsync<InvalidOperationException>(
            () => publisher.PushAsync(onDevice, cancellationToken: Token));
        Assert.Equal($"a GPU's transport cannot be used: {NoIpc}", refused.Message);
        Assert.Equal(0ul, (await _client.StatusAsync(cancellationToken: Token)).Version);

        // Where the tensors can also be copied to the host, that is what happens, from the second push on by the sidecar's own memory.
        CudaSender sender = new();
        publisher.Device = sender;
        for (ulong version = 1; version < 4; version++)
        {
            PushResult pushed = await publisher.PushFromAsync(
                [.. tensors.Select(tensor => tensor.Source)], Use, mayCopy: true, null, null, Token);
            Assert.Equal(
                (version, PushTransport.SharedMemory, NoIpc), (pushed.Version, pushed.Transport, pushed.TransportReason));
        }

        IDeviceSender Use()
        {
            sender.Use(onDevice, 0);
            return sender;
        }
    }

    [Fact]
    public async Task Host_tensors_are_not_sent_by_cuda_ipc()
    {
        await StartAsync("cpu");
        await using WeightPublisher publisher = new(_client);
        ArgumentException refused = await Assert.ThrowsAsync<ArgumentException>(() => publisher.PushAsync(
            [.. GoldenTensors.Of("qwen3").Select(tensor => tensor.Source)],
            options: new PushOptions { Transport = PushTransport.CudaIpc }, cancellationToken: Token));
        Assert.Contains("in the host's", refused.Message, StringComparison.Ordinal);
    }

    /// <summary>Buckets hold all bytes of all tensors, in order, and cut a tensor only between pieces of its digest.</summary>
    [Fact]
    public void Buckets_are_cut_between_tensors_or_between_pieces()
    {
        const long Piece = 131_072;
        Gen<long> sizes = Gen.OneOf(Gen.Long[0, 2000], Gen.Long[0, 5 * Piece], Gen.Long[0, 4].Select(pieces => pieces * Piece));
        Gen.Select(sizes.Array[1, 12], Gen.Long[Piece, 6 * Piece]).Sample((bytes, capacity) =>
        {
            PayloadLayout layout = PayloadLayout.Of([.. bytes.Select((size, i) =>
                new TensorSource($"{i}", TensorDType.BF16, [size / 2], (_, _) => { }))]);
            List<(long From, long To)> cuts = [.. CudaSender.Cuts(layout, capacity)];
            for (int i = 0; i < layout.Manifest.Count; i++)
            {
                long start = (long)layout.Manifest[i].Offset, end = start + layout.Sizes[i], covered = start;
                foreach ((long from, long to) in cuts.Where(cut => cut.From < end && cut.To > start))
                {
                    Assert.Equal(covered, Math.Max(from, start));
                    Assert.True(from <= start || (from - start) % Piece == 0, "a piece is cut");
                    covered = Math.Min(to, end);
                }

                Assert.Equal(end, covered);
            }

            Assert.All(cuts, cut => Assert.InRange(cut.To - cut.From, 1, capacity));
            Assert.Equal(cuts, cuts.OrderBy(cut => cut.From));
        }, iter: 2000);
    }

    private async Task StartAsync(string device)
    {
        SimulatedDevice.RequireSimulated();
        Environment.SetEnvironmentVariable("ROLLOUT_SIM_DEVICES", "2"); // the sidecar's; this process reads its variables at its start
        string program = typeof(CudaPushTests).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
            .Single(attribute => attribute.Key == "RolloutProgram").Value!;
        SidecarOptions options = new()
        {
            Program = program,
            ModelFolder = GoldenTensors.Folder("qwen3"),
            Device = device,
            Threads = 1,
            ExtraArguments = ["--max-sequences", "4", "--kv-cache", "4MiB"],
        };
        _sidecar = await SidecarProcess.StartAsync(options, Token);
        _client = RolloutClient.Connect(_sidecar.Address);
    }

    private async Task<string> BitsAsync()
    {
        List<Sample> samples = await _client.GenerateAsync(s_prompt, s_sampled, cancellationToken: Token).ToListAsync(Token);
        return string.Join(' ', samples.OrderBy(sample => sample.Index).SelectMany(sample =>
            sample.Ids.Zip(sample.LogProbs, (id, logprob) => $"{id}:{BitConverter.SingleToInt32Bits(logprob):x8}")));
    }

    /// <summary>Another model, with the same names and shapes.</summary>
    private static List<(TensorSource Source, byte[] Bytes)> Changed(List<(TensorSource Source, byte[] Bytes)> tensors)
    {
        foreach ((TensorSource _, byte[] bytes) in tensors)
        {
            for (int i = 0; i < bytes.Length; i += 6)
                bytes[i] ^= 0x30;
        }

        return tensors;
    }

    /// <summary>Two tensors an allocation where it can be shared, else all in one range of mapped memory.</summary>
    private DeviceTensor[] Upload(List<(TensorSource Source, byte[] Bytes)> tensors, bool shareable)
    {
        if (_context is null)
        {
            Driver.cuInit(0).ThrowIfFailed();
            Driver.cuDeviceGet(out int device, 0).ThrowIfFailed();
            _context = new CudaContext(device);
        }

        _context.MakeCurrent();
        const long Align = 512;
        List<DeviceTensor> uploaded = [];
        if (!shareable)
        {
            DeviceRange range = new(_context, 0, tensors.Sum(tensor => (tensor.Bytes.Length + Align) / Align * Align));
            _memory.Add(range);
            range.Map();
            nuint at = range.Pointer;
            foreach ((TensorSource source, byte[] bytes) in tensors)
            {
                uploaded.Add(Write(source, bytes, at));
                at += (nuint)((bytes.Length + Align) / Align * Align);
            }

            return [.. uploaded];
        }

        foreach ((TensorSource Source, byte[] Bytes)[] pair in tensors.Chunk(2))
        {
            DeviceBuffer buffer = new(_context, pair.Sum(tensor => tensor.Bytes.Length + Align));
            _memory.Add(buffer);
            uploaded.Add(Write(pair[0].Source, pair[0].Bytes, buffer.Pointer + 32));
            if (pair.Length > 1)
                uploaded.Add(Write(pair[1].Source, pair[1].Bytes, buffer.Pointer + 32 + (nuint)((pair[0].Bytes.Length + 255) / 256 * 256)));
        }

        return [.. uploaded];

        static unsafe DeviceTensor Write(TensorSource source, byte[] bytes, nuint address)
        {
            fixed (byte* from = bytes)
                Driver.cuMemcpyHtoDAsync_v2(address, from, (nuint)bytes.Length, 0).ThrowIfFailed();
            Driver.cuStreamSynchronize(0).ThrowIfFailed();
            return new DeviceTensor(source.Name, source.DType, source.Shape, (nint)address);
        }
    }

    /// <summary>Pieces of simulated device memory that the sidecar has mapped.</summary>
    private int Mappings() => File.ReadLines($"/proc/{_sidecar!.ProcessId}/maps")
        .Count(line => line.Contains("/memfd:cuda-sim ", StringComparison.Ordinal));
}
