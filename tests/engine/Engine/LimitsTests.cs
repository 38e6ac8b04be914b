using System.Diagnostics.Metrics;
using System.Text;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Behaviour exactly at a limit: of length, of memory, of waiting samples, of min_tokens.</summary>
public sealed class LimitsTests
{
    private const int BlockBytes = 2 * 3 * 2 * 32 * sizeof(float) * KvCache.BlockTokens; // keys and values of three layers of qwen3

    private static readonly GroupRequest s_request = new()
    {
        Id = "a",
        Prompt = [.. Enumerable.Range(5, 20)],
        MaxTokens = 8,
        IgnoreEos = true,
        Seed = 3,
    };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Theory]
    [InlineData(0)]
    [InlineData(6)]
    [InlineData(7)]
    [InlineData(8)]
    [InlineData(20)]
    public async Task A_stop_at_the_shortest_length_ends_a_sample_and_one_before_it_does_not(int minTokens)
    {
        byte[][] letters = [.. Enumerable.Range(0, 320).Select(id => Encoding.UTF8.GetBytes($"<{id}>"))];
        await using RolloutEngine engine = TestModels.Load("qwen3", tokenizer: new PieceTokenizer(letters));
        GroupRequest request = s_request with { MaxTokens = 20, N = 3, Temperature = 1.3f };
        // The stop token is drawn at the 7th position for the first time.
        Sequence whole = (await engine.RunAsync(request)).First(sample => !sample.Tokens(0, 6).Contains(sample.Tokens(6, 7)[0]));
        int[] tokens = whole.Tokens(0, 20).ToArray();
        int stop = tokens[6];
        string text = $"<{tokens[5]}><{stop}>"; // of two tokens, so that samples must not mix

        Sequence byText = (await engine.RunAsync(request with { MinTokens = minTokens, StopStrings = ["<>", text] }))[whole.Index];
        int end = Enumerable.Range(1, 19).FirstOrDefault(i => i >= minTokens - 1 && tokens[i - 1] == tokens[5] && tokens[i] == stop, -1);
        Assert.True(minTokens > 7 || end == 6);
        Assert.Equal(end >= 0 ? (FinishReason.Stop, end + 1) : (FinishReason.Length, 20), (byText.FinishReason, byText.Published));
        Assert.Equal(tokens[..byText.Published], byText.Tokens(0, byText.Published).ToArray());

        // A token that ends a sample is not drawn among the first min_tokens, so it ends the sample one later at the earliest.
        Sequence byToken = (await engine.RunAsync(request with { MinTokens = minTokens, StopTokenIds = [stop] }))[whole.Index];
        if (minTokens <= 6) Assert.Equal((FinishReason.Stop, 7), (byToken.FinishReason, byToken.Published));
        else Assert.DoesNotContain(stop, byToken.Tokens(0, minTokens).ToArray());
    }

    [Theory]
    [InlineData(0)]
    [InlineData(4)]
    [InlineData(5)]
    public async Task The_end_of_sequence_token_ends_a_sample_as_soon_as_it_may(int minTokens)
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        int eos = engine.Model.EosTokenIds[0];
        Dictionary<int, float> bias = new() { [eos] = 1000 };
        GroupRequest request = s_request with { IgnoreEos = false, MinTokens = minTokens, LogitBias = bias };
        Sequence sample = (await engine.RunAsync(request))[0];
        Assert.Equal((FinishReason.Stop, minTokens + 1), (sample.FinishReason, sample.Published));
        Assert.Equal(minTokens, sample.Tokens(0, sample.Published).IndexOf(eos));
        Sequence ignored = (await engine.RunAsync(request with { IgnoreEos = true }))[0];
        Assert.Equal((FinishReason.Length, 8), (ignored.FinishReason, ignored.Published));
        Sequence asked = (await engine.RunAsync(request with { IgnoreEos = true, StopTokenIds = [eos] }))[0];
        Assert.Equal(sample.Bits(), asked.Bits());
    }

    [Fact]
    public async Task A_bias_holds_before_and_after_the_shortest_length()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        Dictionary<int, float> only = new() { [17] = 1000, [engine.Model.EosTokenIds[0]] = 2000 };
        Sequence sample = (await engine.RunAsync(s_request with { IgnoreEos = false, MinTokens = 4, LogitBias = only }))[0];
        Assert.Equal([17, 17, 17, 17, engine.Model.EosTokenIds[0]], sample.Tokens(0, sample.Published).ToArray());
    }

    [Fact]
    public async Task A_group_without_a_length_fills_the_context_and_not_a_token_more()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxContext = 50 });
        Sequence sample = (await engine.RunAsync(s_request with { MaxTokens = null }))[0];
        Assert.Equal((50, FinishReason.Length, 30), (engine.MaxContext, sample.FinishReason, sample.Published));
        Group scored = engine.Submit(new() { Id = "full", Prompt = [.. Enumerable.Range(5, 50)], MaxTokens = 0, PromptLogProbs = true });
        await scored.Completed.WaitAsync(Cancelled);
        Assert.Equal((FinishReason.Length, 0), (scored.Sequences[0].FinishReason, scored.Sequences[0].Published));
        Assert.Equal(49, scored.PromptLogProbs.Length);
        Assert.DoesNotContain(0f, scored.PromptLogProbs);
    }

    [Fact]
    public async Task A_sample_may_need_every_block_there_is_and_two_take_turns()
    {
        await using RolloutEngine roomy = TestModels.Load("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { KvCacheBytes = 3 * BlockBytes });
        Assert.Equal((3, 48), (engine.Status.KvBlocksTotal, engine.MaxContext));
        Assert.Throws<InvalidRequestException>(() => engine.Submit(s_request with { MaxTokens = 29 }));
        GroupRequest request = s_request with { MaxTokens = 28, N = 2 };
        string[] expected = [.. (await roomy.RunAsync(request)).Select(sample => sample.Bits())];
        Assert.Equal(expected, (await engine.RunAsync(request)).Select(sample => sample.Bits()));
        Assert.Equal((0, 3), (engine.Status.KvBlocksUsed, engine.Status.KvBlocksTotal));
    }

    [Fact]
    public async Task A_sample_that_lost_its_blocks_goes_on_before_one_that_has_not_begun()
    {
        await using RolloutEngine roomy = TestModels.Load("qwen3");
        ScriptedBackend backend = new();
        EngineOptions options = new() { MaxSequences = 2, KvCacheBytes = 4 * BlockBytes };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, options);
        await engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), Cancelled);
        Group first = engine.Submit(s_request with { MaxTokens = 28 });
        Group second = engine.Submit(s_request with { Id = "b", Prompt = [.. Enumerable.Range(40, 20)], MaxTokens = 28 });
        Group third = engine.Submit(s_request with { Id = "c", Prompt = [.. Enumerable.Range(80, 10)], MaxTokens = 28 });
        backend.HoldAfter(20);
        await engine.ResumeAsync();
        backend.WaitUntilHeld();
        Assert.Equal((1, 1, 2), (engine.Status.Preemptions, engine.Status.Running, engine.Status.Waiting));
        // The first took the second's blocks for its third. One is left, enough for the last sample, but that one is not next in the queue.
        Assert.Equal([20, 13, 0], new[] { first, second, third }.Select(group => group.Sequences[0].Published));
        backend.LetGo();
        foreach (Group group in (Group[])[first, second, third])
        {
            await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
            Assert.Equal((await roomy.RunAsync(group.Request))[0].Bits(), group.Sequences[0].Bits());
        }
    }

    [Fact]
    public async Task The_limit_counts_samples_and_every_way_to_end_frees_their_room()
    {
        ScriptedBackend backend = new();
        EngineOptions options = new() { MaxSequences = 2, MaxWaiting = 3 };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, options);
        GroupRequest request = s_request with { MaxTokens = 60, N = 3, StreamTokens = true };
        for (int round = 0; round < 3; round++)
        {
            backend.HoldAfter(5);
            Group ends = engine.Submit(request);
            Group aborted = engine.Submit(request with { Id = "b", N = 2 });
            for (int i = 0; i < 3; i++) Assert.Throws<NoRoomException>(() => engine.Submit(request with { Id = "c", N = 1 }));
            Assert.Throws<InvalidRequestException>(() => engine.Submit(request with { N = 1 }));
            backend.WaitUntilHeld();
            Assert.Equal((2, 3), (engine.Status.Running, engine.Status.Waiting));
            Task<AbortCounts> aborts = engine.AbortAsync(["nobody", "b", "nobody else"]);
            backend.LetGo();
            AbortCounts counts = await aborts;
            Assert.Equal((1, 2), (counts.Groups, counts.Sequences));
            Assert.Equal(["nobody", "nobody else"], counts.Unknown);
            await Task.WhenAll(ends.Completed, aborted.Completed).WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        }

        Group[] all = [engine.Submit(request with { N = 2 }), engine.Submit(request with { Id = "b", N = 3 })];
        AbortCounts everything = await engine.AbortAsync(ids: null);
        await Task.WhenAll(all.Select(group => group.Completed)).WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        int ended = all.SelectMany(group => group.Sequences).Count(sample => sample.FinishReason == FinishReason.Abort);
        Assert.Equal(ended, everything.Sequences);
    }

    [Fact]
    public async Task A_commit_that_waits_to_drain_fails_when_the_engine_fails()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new() { StepsLeft = 30 };
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = UpdatePolicy.Drain });
        update.Write(0, payload.Bytes);
        Group group = engine.SubmitAndHold(backend, s_request with { MaxTokens = 100, StreamTokens = true }, tokens: 5);
        Task<PauseResult> paused = engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), Cancelled);
        backend.LetGo();
        await paused;
        Task<CommitResult> commit = update.CommitAsync(payload.Digest, Cancelled);
        await engine.ResumeAsync();
        TimeSpan patience = TimeSpan.FromSeconds(30);
        UpdateFailedException e = await Assert.ThrowsAsync<UpdateFailedException>(() => commit.WaitAsync(patience, Cancelled));
        Assert.Contains("device lost", e.Message, StringComparison.Ordinal);
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Assert.Equal(0ul, engine.Version);
    }

    [Fact]
    public async Task Under_abort_what_had_not_begun_begins_on_the_new_weights()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxSequences = 1 });
        // Its samples take the only seat in turn; the other group queues behind them.
        GroupRequest request = s_request with { Id = "queued", N = 2 };
        backend.HoldAfter(2);
        Group begun = engine.Submit(s_request with { N = 2, MaxTokens = 100 });
        backend.WaitUntilHeld();
        Group queued = engine.Submit(request);
        Task<PauseResult> paused = engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), Cancelled);
        backend.LetGo();
        await paused;
        using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = UpdatePolicy.Abort }))
        {
            update.Write(0, payload.Bytes);
            await update.CommitAsync(payload.Digest, Cancelled);
        }

        Assert.All(begun.Sequences, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
        Assert.All(queued.Sequences, sample => Assert.Equal(FinishReason.None, sample.FinishReason));
        await engine.ResumeAsync();
        await queued.Completed.WaitAsync(Cancelled);
        Assert.Equal((await fresh.RunAsync(request)).Select(sample => sample.Bits()), queued.Sequences.Select(sample => sample.Bits()));
    }

    [Fact]
    public async Task The_metrics_count_tokens_by_how_stale_they_were()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        // The model's name distinguishes its metrics from those of other tests.
        await using RolloutEngine engine = RolloutEngine.Load(payload.Folder, backend, new EngineOptions());
        Dictionary<string, long> counts = [];
        using MeterListener listener = new();
        listener.InstrumentPublished = (instrument, self) =>
        {
            if (instrument.Name == "rollout.tokens.sampled") self.EnableMeasurementEvents(instrument);
        };
        listener.SetMeasurementEventCallback<long>((instrument, value, tags, _) =>
        {
            if (instrument.Meter.Tags!.Any(tag => Equals(tag.Value, engine.ModelName))) counts[(string)tags[0].Value!] = value;
        });
        listener.Start();
        GroupRequest request = s_request with { N = 2, MaxTokens = 20 };
        Group group = await engine.UpdateWhileAsync(backend, payload, UpdatePolicy.Keep, request, heldAfter: 5);
        await engine.RunAsync(s_request);
        listener.RecordObservableInstruments();
        Assert.Equal(["0", "1", "2", "3", "4", "5", "6", "7", "8+"], counts.Keys.Order());
        Assert.Equal((30 + 8, 10, 48), (counts["0"], counts["1"], counts.Values.Sum()));
        Assert.Equal(48, engine.Status.GeneratedTokens);
        Assert.All(group.Sequences, sample => Assert.Equal(5, sample.Versions(0, 20).IndexOf(1ul)));
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(1000)]
    public void Work_on_all_cores_is_done_once_each_and_its_error_comes_after_its_end(int items)
    {
        int[] done = new int[items];
        AllCores.ForEach([.. Enumerable.Range(0, items)], i => Interlocked.Increment(ref done[i]));
        Assert.All(done, times => Assert.Equal(1, times));
        if (items == 0) return;
        int running = 0;
        Assert.Throws<InvalidOperationException>(() => AllCores.ForEach([.. Enumerable.Range(0, items)], i =>
        {
            Interlocked.Increment(ref running);
            try
            {
                if (i == items - 1) throw new InvalidOperationException("the last one");
            }
            finally
            {
                Interlocked.Decrement(ref running);
            }
        }));
        Assert.Equal(0, running);
    }
}
