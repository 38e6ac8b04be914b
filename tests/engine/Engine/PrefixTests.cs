using CsCheck;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Cached prefixes give the same results as computing them.</summary>
public sealed class PrefixTests
{
    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    private static readonly Gen<GroupRequest> s_request =
        from kinds in Gen.Int[0, 2].Array[0, 4]
        from tail in Gen.Int[0, 17]
        from tailKind in Gen.Int[0, 2]
        from n in Gen.Int[1, 3]
        from salted in Gen.Bool
        from scores in Gen.Bool
        from seed in Gen.ULong[0, 3]
        select new GroupRequest
        {
            Id = "probe",
            Prompt = [.. kinds.SelectMany(kind => Piece(kind, 16)), .. Piece(tailKind, tail), 5],
            N = n,
            Seed = seed,
            MaxTokens = 18, // so that samples fill a block of their own
            IgnoreEos = true,
            CacheSalt = salted ? "salt" : "",
            PromptLogProbs = scores,
        };

    /// <summary>Prompts of few blocks in any order: equal blocks after different pasts are common.</summary>
    [Fact]
    public void Prompts_that_share_blocks_give_what_each_gives_to_a_cold_engine()
        => Gen.Select(s_request.Array[2, 6], Gen.OneOf(5, 64, 512), Gen.Bool).Sample((requests, chunk, atOnce) =>
        {
            string[] cold = [.. requests.Select(request => RunAsync([request], chunk: 512, atOnce: false).GetAwaiter().GetResult()[0])];
            Assert.Equal(cold, RunAsync(requests, chunk, atOnce).GetAwaiter().GetResult());
        }, iter: 15, threads: 1);

    /// <summary>Longer than a block, so that blocks and what comes after them are equal at different places.</summary>
    private static IEnumerable<int> Piece(int kind, int tokens) => Enumerable.Range(0, tokens).Select(i => 30 + 40 * kind + i);

    private static async Task<string[]> RunAsync(GroupRequest[] requests, int chunk, bool atOnce)
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxBatchTokens = chunk });
        List<Group> groups = [];
        foreach ((int i, GroupRequest request) in requests.Index())
        {
            groups.Add(engine.Submit(request with { Id = $"{i}" }));
            if (!atOnce) await groups[^1].Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        }

        await Task.WhenAll(groups.Select(group => group.Completed)).WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        return [.. groups.Select(group => string.Join('\n', group.Sequences.Select(sample => sample.Bits())) + Scores(group))];
    }

    private static string Scores(Group group) => string.Join(' ', group.PromptLogProbs.Select(BitConverter.SingleToInt32Bits));

    /// <summary>Keys and values that a KEEP update left mixed serve their own samples only, whenever the update came.</summary>
    [Theory]
    [InlineData(16, 2)] // in the middle of the prompt
    [InlineData(7, 3)]
    [InlineData(512, 20)] // in the middle of the samples
    public async Task After_an_update_under_keep_a_prompt_is_computed_by_the_new_weights_alone(int chunk, int heldAfter)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxBatchTokens = chunk });
        int[] prompt = [.. Piece(0, 16), .. Piece(1, 16), .. Piece(2, 9)];
        GroupRequest request = new() { Id = "a", Prompt = prompt, N = 3, MaxTokens = 60, Seed = 4, IgnoreEos = true };
        Group kept = await engine.UpdateWhileAsync(backend, payload, UpdatePolicy.Keep, request, heldAfter);
        Assert.All(kept.Sequences, sample => Assert.Equal((FinishReason.Length, 0ul), (sample.FinishReason, sample.OldestKvVersion)));

        GroupRequest again = request with { Id = "again" };
        GroupRequest longer = request with { Id = "longer", Prompt = [.. request.Prompt, .. kept.Sequences[1].Tokens(0, 60)] };
        foreach (GroupRequest next in (GroupRequest[])[longer, again, longer])
        {
            string[] expected = [.. (await fresh.RunAsync(next)).Select(sample => sample.Bits())];
            Assert.Equal(expected, (await engine.RunAsync(next)).Select(sample => sample.Bits()));
        }
    }

    [Fact]
    public async Task After_an_update_under_recompute_one_sample_computes_the_prompt_for_all()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxBatchTokens = 64 });
        GroupRequest request = new() { Id = "a", Prompt = [.. Enumerable.Range(3, 40)], N = 4, MaxTokens = 20, IgnoreEos = true };
        await engine.UpdateWhileAsync(backend, payload, UpdatePolicy.Recompute, request, heldAfter: 5);
        Assert.Equal((40 + 40 + 3 * 8, 3 * 32), (engine.Status.PrefilledTokens, engine.Status.PrefixHitTokens));
    }

    /// <summary>What a sample computes anew, under one version, others may find again.</summary>
    [Fact]
    public async Task Keys_and_values_computed_anew_after_keep_are_found()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        int[] prompt = [.. Enumerable.Range(3, 40)];
        GroupRequest request = new() { Id = "a", Prompt = prompt, MaxTokens = 100, IgnoreEos = true, StreamTokens = true };
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = UpdatePolicy.Keep });
        update.Write(0, payload.Bytes);
        Group group = engine.SubmitAndHold(backend, request, tokens: 5);
        Task paused = engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), Cancelled);
        backend.LetGo();
        await paused;
        await update.CommitAsync(payload.Digest, Cancelled);
        await engine.SleepAsync(MemoryTags.KvCache);
        await engine.WakeUpAsync(MemoryTags.KvCache);
        await engine.ResumeAsync();
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Assert.Equal(1ul, group.Sequences[0].OldestKvVersion);
        Group later = engine.Submit(request with { Id = "later" });
        await later.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Assert.Equal(32, later.CachedPromptTokens);
    }

    [Fact]
    public async Task Samples_that_wait_for_a_seat_hit_the_prompt_of_the_first_one_and_are_counted()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxSequences = 1 });
        Group group = engine.Submit(new() { Id = "a", Prompt = [.. Enumerable.Range(3, 40)], N = 3, MaxTokens = 5, IgnoreEos = true });
        await group.Completed.WaitAsync(Cancelled);
        EngineStatus status = engine.Status;
        Assert.Equal((40 + 8 + 8, 32 + 32, 15), (status.PrefilledTokens, status.PrefixHitTokens, status.GeneratedTokens));
        Assert.Equal(0, group.CachedPromptTokens); // the first sample found nothing

        Group later = engine.Submit(group.Request with { Id = "b", N = 1 });
        await later.Completed.WaitAsync(Cancelled);
        Assert.Equal(32, later.CachedPromptTokens);
        Assert.Equal((0, 2), (engine.Status.KvBlocksUsed, engine.Status.KvBlocksCached));
    }
}
