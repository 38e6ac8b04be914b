using System.Reflection;
using Xunit;

namespace Rollout.Client.Tests;

/// <summary>The client against the real program: what a trainer does from step to step.</summary>
public sealed class RealSidecarTests : IAsyncLifetime
{
    private static readonly string s_model = GoldenTensors.Folder("qwen3");
    private static readonly int[] s_prompt = [5, 6, 7, 8];
    private static readonly GenerateOptions s_greedy = new() { MaxTokens = 16, Temperature = 0, IgnoreEos = true };

    private readonly string _folder = Directory.CreateTempSubdirectory("rollout-test-").FullName;
    private SidecarProcess _sidecar = null!;
    private RolloutClient _client = null!;

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    public async ValueTask InitializeAsync()
    {
        string program = typeof(RealSidecarTests).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
            .Single(attribute => attribute.Key == "RolloutProgram").Value!;
        _sidecar = await SidecarProcess.StartAsync(new SidecarOptions { Program = program, ModelFolder = s_model, Threads = 1 }, Token);
        _client = RolloutClient.Connect(_sidecar.Address);
    }

    public async ValueTask DisposeAsync()
    {
        await _client.DisposeAsync();
        await _sidecar.DisposeAsync();
        Assert.Empty(Directory.GetFiles(_folder));
        Directory.Delete(_folder);
    }

    [Theory]
    [InlineData(PushTransport.SharedMemory, UpdateMode.Staged)]
    [InlineData(PushTransport.SharedMemory, UpdateMode.InPlace)]
    [InlineData(PushTransport.Inline, UpdateMode.InPlace)]
    [InlineData(PushTransport.File, UpdateMode.Staged)]
    public async Task Full_partial_and_sparse_pushes_by_every_transport_say_what_they_did(PushTransport transport, UpdateMode mode)
    {
        PushOptions options = new() { Transport = transport, Mode = mode, Folder = _folder };
        await using WeightPublisher publisher = new(_client) { MaxSharedMemoryBytes = 100_000 }; // a ring
        List<(TensorSource Source, byte[] Bytes)> tensors = GoldenTensors.Of("qwen3");
        int[] original = await TokensAsync();

        PushResult full = await publisher.PushAsync(
            [.. tensors.Select(tensor => tensor.Source)], options: options, cancellationToken: Token);
        Assert.Equal((1ul, mode), (full.Version, full.Mode));
        Assert.Equal(original, await TokensAsync()); // the same weights

        (TensorSource norm, byte[] bytes) = tensors.Single(tensor => tensor.Source.Name == "model.norm.weight");
        for (int i = 0; i < bytes.Length; i += 2)
            (bytes[i], bytes[i + 1]) = (0x00, 0xBF); // -0.5: another model
        await publisher.PushAsync([norm], options: options with { Partial = true }, cancellationToken: Token);
        int[] changed = await TokensAsync();
        Assert.NotEqual(original, changed);
        if (transport == PushTransport.File)
            return;

        byte[] before = GoldenTensors.Of("qwen3").Single(tensor => tensor.Source.Name == "model.norm.weight").Bytes;
        uint[] all = [.. Enumerable.Range(0, before.Length / 2).Select(i => (uint)i)];
        TensorSource sparse = TensorSource.Sparse(norm.Name, TensorDType.BF16, norm.Shape, all, before);
        PushResult last = await publisher.PushAsync([sparse], options: options with { Partial = true }, cancellationToken: Token);
        Assert.Equal(3ul, last.Version);
        Assert.Equal(original, await TokensAsync());
        WeightsDescription described = await _client.DescribeWeightsAsync(cancellationToken: Token);
        string digest = WeightDigest.Show(FakeWeights.DigestOf(before));
        Assert.Equal(digest, described.Tensors.Single(tensor => tensor.Name == norm.Name).Digest);
    }

    [Theory]
    [InlineData(PushTransport.SharedMemory)]
    [InlineData(PushTransport.Inline)]
    public async Task Slices_in_any_order_are_the_whole_tensors(PushTransport transport)
    {
        await using WeightPublisher publisher = new(_client);
        PushOptions options = new() { Transport = transport };
        List<(TensorSource Source, byte[] Bytes)> tensors = GoldenTensors.Of("qwen3");
        TensorSource[] slices = [.. tensors.SelectMany(tensor => Slices(tensor.Source, tensor.Bytes)).Reverse()];
        int[] original = await TokensAsync();
        WeightsDescription before = await _client.DescribeWeightsAsync(cancellationToken: Token);
        PushResult pushed = await publisher.PushAsync(slices, options: options, cancellationToken: Token);
        Assert.Equal(1ul, pushed.Version);
        Assert.Equal(original, await TokensAsync());
        WeightsDescription after = await _client.DescribeWeightsAsync(cancellationToken: Token);
        Assert.Equal(before.Tensors.Select(Digest).Order(), after.Tensors.Select(Digest).Order());

        // Every slice but the last of one tensor, and then that one with it.
        TensorSource[] norm = [.. slices.Where(slice => slice.Name == "model.norm.weight")];
        WeightUpdateRejectedException refused = await Assert.ThrowsAsync<WeightUpdateRejectedException>(
            () => publisher.PushAsync(norm[1..], options: options with { Partial = true }, cancellationToken: Token));
        Assert.Contains($"rows {norm[0].FirstRow} to {norm[0].Shape[0] - 1} are in no slice", refused.Message, StringComparison.Ordinal);
        await publisher.PushAsync(norm, options: options with { Partial = true }, cancellationToken: Token);
        Assert.Equal(original, await TokensAsync());
        await Assert.ThrowsAsync<ArgumentException>(() => publisher.PushAsync(
            norm, options: new PushOptions { Transport = PushTransport.File, Folder = _folder, Partial = true }, cancellationToken: Token));

        static (string, string) Digest(DescribedTensor tensor) => (tensor.Name, tensor.Digest);
    }

    /// <summary>Three slices of a tensor, the last one the longest.</summary>
    private static IEnumerable<TensorSource> Slices(TensorSource whole, byte[] bytes)
    {
        long rowBytes = bytes.Length / whole.Shape[0], third = whole.Shape[0] / 3;
        foreach ((long first, long end) in ((long, long)[])[(0, third), (third, 2 * third), (2 * third, whole.Shape[0])])
        {
            yield return TensorSource.Slice(whole.Name, whole.DType, whole.Shape, first, end - first, (offset, destination) =>
                bytes.AsSpan((int)((first * rowBytes) + offset), destination.Length).CopyTo(destination));
        }
    }

    [Fact]
    public async Task Groups_of_a_batch_have_the_samples_that_each_has_alone()
    {
        int[][] prompts = [[5, 6, 7, 8], [9, 10, 11], [12]];
        RolloutRequest[] requests = [.. prompts.Select((prompt, i) =>
            new RolloutRequest(prompt, s_greedy with { N = 4, Temperature = 1, Seed = (ulong)i, MaxTokens = 10 * (3 - i) }))];
        List<SampleGroup> groups = await _client.GenerateGroupsAsync(requests, cancellationToken: Token).ToListAsync(Token);
        Assert.Equal(requests.Select(request => request.RequestId).Order(), groups.Select(group => group.Request.RequestId).Order());
        foreach (SampleGroup group in groups)
        {
            List<Sample> alone = await _client.GenerateAsync(group.Request, cancellationToken: Token).ToListAsync(Token);
            Assert.Equal(alone.OrderBy(sample => sample.Index).Select(sample => sample.Ids), group.Samples.Select(sample => sample.Ids));
        }
    }

    [Fact]
    public async Task A_trainer_that_shares_the_machine_puts_the_sidecar_to_sleep_while_it_learns()
    {
        await using WeightPublisher publisher = new(_client);
        int[] original = await TokensAsync();
        SleepResult asleep = await _client.SleepAsync(cancellationToken: Token);
        Assert.Equal((EngineState.Sleeping, MemoryTags.All), (asleep.State, asleep.Asleep));
        Assert.Equal([MemoryTags.Weights, MemoryTags.KvCache], asleep.Freed.Select(freed => freed.Tag));
        RolloutStateException refused = await Assert.ThrowsAsync<RolloutStateException>(() => TokensAsync());
        Assert.Contains("SLEEPING", refused.Message, StringComparison.Ordinal);

        Assert.Equal(MemoryTags.KvCache, await _client.WakeUpAsync(MemoryTags.Weights, cancellationToken: Token));
        await publisher.PushAsync([.. GoldenTensors.Of("qwen3").Select(tensor => tensor.Source)], cancellationToken: Token);
        Assert.Equal(MemoryTags.None, await _client.WakeUpAsync(cancellationToken: Token));
        Assert.Equal(original, await TokensAsync());
    }

    [Fact]
    public async Task A_push_in_place_that_breaks_half_way_poisons_and_the_next_full_one_heals()
    {
        await using WeightPublisher publisher = new(_client);
        int[] original = await TokensAsync();
        List<(TensorSource Source, byte[] Bytes)> tensors = GoldenTensors.Of("qwen3");
        TensorSource lying = new(tensors[^1].Source.Name, TensorDType.BF16, tensors[^1].Source.Shape,
            (_, _) => throw new InvalidOperationException("the trainer's tensor is gone"));
        // A ring: with room for the whole payload, nothing would be sent before all is written, and the push would have no effect.
        await using (WeightPublisher ring = new(_client) { MaxSharedMemoryBytes = 50_000 })
        {
            await Assert.ThrowsAsync<InvalidOperationException>(() => ring.PushAsync(
                [.. tensors.SkipLast(1).Select(tensor => tensor.Source), lying],
                options: new PushOptions { Mode = UpdateMode.InPlace },
                cancellationToken: Token));
        }

        SidecarStatus status = await _client.StatusAsync(cancellationToken: Token);
        Assert.Equal((EngineState.Poisoned, 0ul), (status.State, status.Version));
        RolloutStateException refused = await Assert.ThrowsAsync<RolloutStateException>(() => TokensAsync());
        Assert.Contains("POISONED", refused.Message, StringComparison.Ordinal);
        await publisher.PushAsync([.. tensors.Select(tensor => tensor.Source)], cancellationToken: Token);
        Assert.Equal(original, await TokensAsync());
    }

    /// <summary>The sidecar's own memory is opened only under its name, and no more of it is used than the push requested.</summary>
    [Fact]
    public async Task The_sidecars_memory_is_opened_only_where_the_path_leads_to_it()
    {
        List<(TensorSource Source, byte[] Bytes)> tensors = GoldenTensors.Of("qwen3");
        PayloadLayout layout = PayloadLayout.Of([.. tensors.Select(tensor => tensor.Source)]);
        UpdateCall call = new(_client.Weights, new Grpc.Core.CallOptions(deadline: DateTime.UtcNow.AddMinutes(1)));
        await using (call)
        {
            V1.BeginUpdate begin = new()
            {
                Manifest = { layout.Manifest },
                PayloadBytes = (ulong)layout.PayloadBytes,
                NewVersion = 1,
                SegmentBytes = (ulong)layout.PayloadBytes,
            };
            await call.SendAsync(new V1.UpdateRequest { Begin = begin }, Token);
            V1.Segment segment = (await call.NextAsync(Token)).Ready.Segment;
            foreach (long most in (long[])[1, 4096, (long)segment.Bytes - 1, (long)segment.Bytes, (long)segment.Bytes + 1, long.MaxValue])
            {
                using PayloadFile? file = PayloadFile.TryOpen(segment, most);
                Assert.Equal(Math.Min(most, (long)segment.Bytes), file!.Capacity);
                Assert.Equal(segment.Path, file.Path);
            }

            foreach (V1.Segment other in (V1.Segment[])
                [
                    new V1.Segment(segment) { Name = segment.Name + "1" },
                    new V1.Segment(segment) { Path = "/proc/self/exe" },
                    new V1.Segment(segment) { Path = "/proc/self/fd/999999" },
                    new V1.Segment(segment) { Path = Path.Combine(_folder, "no such") },
                ])
            {
                Assert.Null(PayloadFile.TryOpen(other, 4096));
            }
        }
    }

    private async Task<int[]> TokensAsync()
    {
        await foreach (Sample sample in _client.GenerateAsync(s_prompt, s_greedy, cancellationToken: Token))
            return sample.Ids;
        throw new InvalidOperationException("no sample came");
    }
}
