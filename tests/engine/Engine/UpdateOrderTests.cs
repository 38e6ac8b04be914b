using Microsoft.Win32.SafeHandles;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Updates that compete, end or fail at any point: only one is active, and an ended one changes nothing any more.</summary>
public sealed class UpdateOrderTests
{
    private static readonly GroupRequest s_request = new()
    {
        Id = "probe",
        Prompt = [.. Enumerable.Range(3, 40)],
        N = 2,
        MaxTokens = 60,
        Seed = 9,
        IgnoreEos = true,
        StreamTokens = true,
    };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Theory]
    [InlineData(UpdateMode.Staged)]
    [InlineData(UpdateMode.InPlace)]
    public async Task Of_two_that_build_on_one_version_the_second_to_begin_is_refused(UpdateMode mode)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        foreach ((ulong from, ulong to) in ((ulong, ulong)[])[(0, 7), (7, 1ul << 32)]) // versions may jump
        {
            using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(from, to) with { Mode = mode }))
            {
                update.Write(0, payload.Bytes);
                await update.CommitAsync(payload.Digest, Cancelled);
            }

            Assert.Equal(to, engine.Version);
            UpdateRejectedException e = Assert.Throws<UpdateRejectedException>(() => engine.BeginUpdate(payload.Manifest(from, to + 1)));
            Assert.Equal(nameof(UpdateManifest.BaseVersion), Assert.Single(e.Problems).Field);
        }
    }

    [Fact]
    public async Task A_commit_that_lost_the_seat_while_it_waited_puts_nothing_in_service()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        string old = (await engine.RunAsync(s_request))[0].Bits();
        Group begun = engine.SubmitAndHold(backend, s_request with { Id = "begun" }, tokens: 20);
        WeightUpdate first = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = UpdatePolicy.Keep });
        first.Write(0, payload.Bytes);
        Task<CommitResult> commit = first.CommitAsync(payload.Digest, Cancelled);
        first.Dispose();
        using (WeightUpdate second = await engine.OpenUpdateAsync(payload.Manifest(0, 2)))
        {
            second.Write(0, payload.Bytes.AsSpan(0, 1000)); // where the first one's bytes were
            backend.LetGo();
            await Assert.ThrowsAsync<UpdateFailedException>(() => commit);
            await begun.Completed.WaitAsync(Cancelled);
            Assert.All(begun.Sequences.SelectMany(s => s.Versions(0, s.Published).ToArray()), version => Assert.Equal(0ul, version));
            Assert.Equal(0ul, engine.Version);
            Assert.Equal(old, (await engine.RunAsync(s_request))[0].Bits());
        }

        Assert.Equal((EngineState.Running, 0ul), (engine.Status.State, engine.Version));
    }

    [Fact]
    public async Task An_update_in_place_that_ended_while_it_waited_for_the_loop_does_not_stop_it()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 20);
        WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace, Policy = UpdatePolicy.Abort });
        Task opened = update.OpenAsync(Cancelled);
        update.Dispose();
        backend.LetGo();
        await Assert.ThrowsAsync<UpdateFailedException>(() => opened);
        await begun.Completed.WaitAsync(TimeSpan.FromMinutes(1), Cancelled);
        Assert.All(begun.Sequences, sample => Assert.Equal(FinishReason.Length, sample.FinishReason));
        Assert.Equal(EngineState.Running, engine.Status.State);
    }

    public static TheoryData<string, UpdateMode> Breaks
    {
        get
        {
            TheoryData<string, UpdateMode> data = [];
            foreach (string how in (string[])[
                "sender", "out of order", "too long", "longer than a number", "backwards", "digest", "half a digest", "index", "tied",
                "short file", "unreadable file", "cancelled", "early commit"])
            {
                data.Add(how, UpdateMode.Staged);
                data.Add(how, UpdateMode.InPlace);
            }

            return data;
        }
    }

    /// <summary>After the first byte: a staged update has no effect, and one in place poisons the engine.</summary>
    [Theory, MemberData(nameof(Breaks))]
    public async Task What_breaks_after_its_first_byte_poisons_in_place_and_changes_nothing_staged(string how, UpdateMode mode)
    {
        using UpdatePayload payload = UpdatePayload.Of("llama3");
        await using RolloutEngine engine = TestModels.Load("llama3");
        string old = (await engine.RunAsync(s_request))[0].Bits();
        ManifestTensor embedding = payload.Manifest(0, 1).Tensors.Single(tensor => tensor.Name == "model.embed_tokens.weight");
        byte[] bytes = payload.Bytes;
        UpdateManifest manifest = payload.Manifest(0, 1) with { Mode = mode, Owner = "clumsy" };
        if (how == "tied")
        {
            // Before the embedding, as state dictionaries have it; a bit differs.
            bytes = [.. bytes.AsSpan((int)embedding.Offset, (int)embedding.Bytes), .. bytes];
            bytes[embedding.Bytes / 2] ^= 1;
            manifest = manifest with
            {
                PayloadBytes = bytes.Length,
                Tensors = [embedding with { Name = "lm_head.weight", Offset = 0 },
                    .. manifest.Tensors.Select(tensor => tensor with { Offset = tensor.Offset + embedding.Bytes })],
            };
        }

        if (how == "index")
        {
            // One tensor whole, then one whose indices go back: in one message.
            bytes = [.. new byte[128], 5, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4];
            manifest = manifest with
            {
                Partial = true,
                PayloadBytes = bytes.Length,
                Tensors = [new("model.norm.weight", DType.BFloat16, [64], 0), embedding with { Offset = 128, SparseCount = 2 }],
            };
        }

        using (WeightUpdate update = await engine.OpenUpdateAsync(manifest))
        {
            Exception? e = await Record.ExceptionAsync(() => BreakAsync(update, how, bytes, payload));
            Assert.True(how == "sender" ? e is null : e is UpdateFailedException or OperationCanceledException, $"{e}");
            if (e is not null)
            {
                // It cannot be committed afterwards.
                Assert.Throws<UpdateFailedException>(() => update.Write(update.Parts[0].ReceivedBytes, []));
                await Assert.ThrowsAsync<UpdateFailedException>(() => update.CommitAsync(default, Cancelled));
            }
        }

        Assert.Equal((0ul, null), (engine.Version, engine.Status.UpdateOwner));
        if (mode == UpdateMode.Staged)
        {
            Assert.Equal(EngineState.Running, engine.Status.State);
            Assert.Equal(old, (await engine.RunAsync(s_request))[0].Bits());
            return;
        }

        Assert.Equal(EngineState.Poisoned, engine.Status.State);
        Assert.Contains("clumsy", engine.Status.Reason, StringComparison.Ordinal);
        Assert.Equal(EngineState.Poisoned, Assert.Throws<EngineStateException>(() => engine.Submit(s_request)).State);
    }

    private static async Task BreakAsync(WeightUpdate update, string how, byte[] bytes, UpdatePayload payload)
    {
        switch (how)
        {
            case "sender":
                update.Write(0, bytes.AsSpan(0, 1));
                break;
            case "out of order":
                update.Write(0, bytes.AsSpan(0, 1000));
                update.Write(999, bytes.AsSpan(999, 1000));
                break;
            case "too long":
                update.Write(0, bytes);
                update.Write(bytes.Length, [1]);
                break;
            case "digest":
                update.Write(0, bytes);
                await update.CommitAsync(new byte[16], Cancelled);
                break;
            case "tied":
                update.Write(0, bytes);
                await update.CommitAsync(default, Cancelled);
                break;
            case "half a digest":
                update.Write(0, bytes);
                await update.CommitAsync(payload.Digest.AsMemory(0, 8), Cancelled);
                break;
            case "longer than a number" or "backwards":
                update.Write(0, bytes.AsSpan(0, 1));
                using (SafeFileHandle handle = File.OpenHandle(Path.Combine(payload.Folder, "config.json")))
                    update.ReadFrom(handle, 0, 1, how == "backwards" ? -1 : long.MaxValue, Cancelled);
                break;
            case "unreadable file":
                // As with a failing disk: the first page of a process is never mapped.
                using (SafeFileHandle handle = File.OpenHandle("/proc/self/mem")) update.ReadFrom(handle, 0, 0, bytes.Length, Cancelled);
                break;
            case "index":
                update.Write(0, bytes);
                break;
            case "early commit":
                update.Write(0, bytes.AsSpan(0, bytes.Length - 1));
                await update.CommitAsync(default, Cancelled);
                break;
            default:
                string file = Path.Combine(payload.Folder, "short");
                File.WriteAllBytes(file, bytes[..^1]);
                using (SafeFileHandle handle = File.OpenHandle(file))
                    update.ReadFrom(handle, 0, 0, bytes.Length, new CancellationToken(canceled: how == "cancelled"));
                break;
        }
    }

    [Fact]
    public async Task A_message_without_a_byte_poisons_nothing()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace }))
            update.Write(0, []);
        Assert.Equal(EngineState.Running, engine.Status.State);
    }

    [Fact]
    public async Task An_ended_update_accepts_no_bytes_and_no_commit()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        foreach (UpdateMode mode in (UpdateMode[])[UpdateMode.Staged, UpdateMode.InPlace])
        {
            WeightUpdate given = engine.BeginUpdate(payload.Manifest(0, 1) with { Mode = mode });
            given.Dispose();
            await Assert.ThrowsAsync<UpdateFailedException>(() => given.OpenAsync(Cancelled));
            await Assert.ThrowsAsync<UpdateFailedException>(() => given.CommitAsync(default, Cancelled));
            Assert.Throws<UpdateFailedException>(() => given.Write(0, payload.Bytes));
            given.Dispose();
        }

        Assert.Equal((EngineState.Running, 0ul, null), (engine.Status.State, engine.Version, engine.Status.UpdateOwner));
    }

    [Fact]
    public async Task Once_there_is_a_second_set_an_update_needs_no_more_memory()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        UpdateManifest manifest = payload.Manifest(0, 1);
        long bytes;
        using (WeightUpdate update = engine.BeginUpdate(manifest with { Mode = UpdateMode.Staged })) bytes = update.StagingBytes;
        backend.FreeBytes = 0; // the second set has it
        foreach (UpdateMode mode in (UpdateMode[])[UpdateMode.Auto, UpdateMode.Staged])
            using (WeightUpdate update = engine.BeginUpdate(manifest with { Mode = mode })) Assert.Equal(UpdateMode.Staged, update.Mode);

        // A quarter more than the weights must be free, or no set is allocated.
        await using RolloutEngine other = TestModels.Load("qwen3", backend = new ScriptedBackend { FreeBytes = bytes / 4 * 5 - 1 });
        using (WeightUpdate update = other.BeginUpdate(manifest)) Assert.Equal(UpdateMode.InPlace, update.Mode);
        backend.FreeBytes++;
        using (WeightUpdate update = other.BeginUpdate(manifest)) Assert.Equal(UpdateMode.Staged, update.Mode);
    }
}
