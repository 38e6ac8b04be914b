using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Guarantees to callers of the engine.</summary>
public sealed class EngineTests
{
    private static readonly GroupRequest s_request = new() { Id = "a", Prompt = [5, 6, 7], MaxTokens = 8, IgnoreEos = true, Seed = 3 };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Fact]
    public async Task An_id_in_flight_is_refused()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        Group group = engine.Submit(s_request with { MaxTokens = 500 });
        InvalidRequestException e = Assert.Throws<InvalidRequestException>(() => engine.Submit(s_request));
        Assert.Equal("Id", Assert.Single(e.Problems).Field);
        await engine.AbortAsync(group);
    }

    [Fact]
    public async Task Streamed_chunks_join_to_the_whole_sample()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        Group group = engine.Submit(s_request with { N = 3, MaxTokens = 60, StreamTokens = true, Prompt = [5, 6, 7, 9] });
        List<int>[] tokens = [[], [], []];
        int ends = 0;
        await foreach (SequenceChunk chunk in group.ReadAsync(Cancelled))
        {
            Assert.Equal(tokens[chunk.Sequence.Index].Count, chunk.Start);
            tokens[chunk.Sequence.Index].AddRange(chunk.Sequence.Tokens(chunk.Start, chunk.End));
            if (chunk.FinishReason != FinishReason.None) ends++;
        }

        Assert.Equal(3, ends);
        for (int i = 0; i < 3; i++) Assert.Equal(group.Sequences[i].Tokens(0, 60).ToArray(), tokens[i]);
    }

    [Fact]
    public async Task A_streams_tokens_can_be_read_while_its_sequences_go_on()
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group group = engine.SubmitAndHold(backend, s_request with { MaxTokens = 100, StreamTokens = true }, tokens: 3);
        await using IAsyncEnumerator<SequenceChunk> chunks = group.ReadAsync(Cancelled).GetAsyncEnumerator(Cancelled);
        Task<bool> next = chunks.MoveNextAsync().AsTask();
        await Task.WhenAny(next, Task.Delay(TimeSpan.FromSeconds(15), Cancelled));
        bool came = next.IsCompleted;
        backend.LetGo();
        Assert.True(came, "no token came while the loop was held");
        Assert.True(await next);
        Assert.Equal((0, FinishReason.None), (chunks.Current.Start, chunks.Current.FinishReason));
        Assert.InRange(chunks.Current.End, 1, 3);
    }

    [Fact]
    public async Task A_group_has_one_prefill()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        int[] prompt = [.. Enumerable.Range(3, 75)];
        await engine.RunAsync(s_request with { Prompt = prompt, N = 8, MaxTokens = 4 });
        Assert.Equal(75, engine.Status.PrefilledTokens);
    }

    [Fact]
    public async Task Stop_tokens_stop_strings_and_min_tokens_end_a_sample_where_they_should()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", tokenizer: NewTokenizer());
        GroupRequest greedy = s_request with { Temperature = 0, MaxTokens = 16 };
        int[] tokens = (await engine.RunAsync(greedy))[0].Tokens(0, 16).ToArray();
        int stop = Array.FindIndex(tokens, 4, token => !tokens.AsSpan(0, 4).Contains(token));

        Sequence byToken = (await engine.RunAsync(greedy with { StopTokenIds = [tokens[stop]] }))[0];
        Assert.Equal((FinishReason.Stop, stop + 1), (byToken.FinishReason, byToken.Published));

        string text = Text(tokens[stop - 1]) + Text(tokens[stop])[..2]; // across two tokens
        Sequence byText = (await engine.RunAsync(greedy with { StopStrings = ["never", text] }))[0];
        Assert.Equal((FinishReason.Stop, stop + 1, text), (byText.FinishReason, byText.Published, byText.MatchedStop));

        Sequence later = (await engine.RunAsync(greedy with { StopTokenIds = [tokens[0]], MinTokens = 3 }))[0];
        Assert.DoesNotContain(tokens[0], later.Tokens(0, 3).ToArray()); // forbidden, not only ignored
        Assert.True(later.Published >= 3);
    }

    [Fact]
    public async Task Abort_returns_the_partial_tokens_and_counts_what_it_ended()
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group group = engine.SubmitAndHold(backend, s_request with { N = 4, MaxTokens = 100, StreamTokens = true }, tokens: 3);
        Task<AbortCounts> ordered = engine.AbortAsync(["a", "unknown"]);
        backend.LetGo();
        AbortCounts counts = await ordered;
        Assert.Equal((1, 4, "unknown"), (counts.Groups, counts.Sequences, Assert.Single(counts.Unknown)));
        await group.Completed.WaitAsync(Cancelled);
        Assert.All(group.Sequences, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
        Assert.All(group.Sequences, sample => Assert.Equal(4, sample.Published)); // including the step in flight
        string whole = (await engine.RunAsync(s_request with { N = 4, MaxTokens = 100 }))[0].Bits();
        Assert.StartsWith(group.Sequences[0].Bits()[..^" Abort".Length], whole);
    }

    [Fact]
    public async Task All_problems_of_a_request_are_listed_and_other_requests_are_not_affected()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        string alone = (await engine.RunAsync(s_request with { MaxTokens = 200 }))[0].Bits();
        Group running = engine.Submit(s_request with { MaxTokens = 200 });
        InvalidRequestException e = Assert.Throws<InvalidRequestException>(() => engine.Submit(new GroupRequest
        {
            Id = "",
            Prompt = [1, 320, -1],
            N = 0,
            Temperature = float.NaN,
            TopK = -1,
            TopP = 0,
            MinP = 2,
            MaxTokens = 5000,
            MinTokens = -1,
            LogitBias = new Dictionary<int, float> { [999] = float.PositiveInfinity },
            StopTokenIds = [400],
            StopStrings = ["x"],
            TopLogProbs = 321,
            PromptTop = 1,
        }));
        string[] fields =
        [
            "Id", "Prompt[1]", "N", "Temperature", "TopK", "TopP", "MinP",
            "LogitBias[0]", "LogitBias[999]", "MaxTokens", "MinTokens",
            "StopTokenIds[0]", "StopStrings", "TopLogProbs", "PromptTop",
        ];
        Assert.Equal(fields.Order(), e.Problems.Select(problem => problem.Field).Order());
        await running.Completed.WaitAsync(Cancelled);
        Assert.Equal(alone, running.Sequences[0].Bits());
    }

    [Fact]
    public async Task More_waiting_samples_than_allowed_are_refused_and_fit_again_later()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxSequences = 2, MaxWaiting = 4 });
        Group first = engine.Submit(s_request with { N = 6, MaxTokens = 300 });
        Assert.Throws<NoRoomException>(() => engine.Submit(s_request with { Id = "b" }));
        await first.Completed.WaitAsync(Cancelled);
        await engine.RunAsync(s_request with { Id = "b", N = 6 });
    }

    [Fact]
    public async Task A_pause_that_keeps_freezes_and_resumes_with_the_same_bits()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        string alone = (await engine.RunAsync(s_request with { MaxTokens = 400 }))[0].Bits();
        Group group = engine.Submit(s_request with { MaxTokens = 400 });
        await engine.PauseAsync(PauseMode.Keep, "trainer", TimeSpan.FromMinutes(1), Cancelled);
        Assert.Equal((EngineState.Paused, "trainer"), (engine.Status.State, engine.Status.Reason));
        int published = group.Sequences[0].Published;
        long steps = engine.Status.Steps;
        await Task.Delay(50, Cancelled);
        Assert.Equal((published, steps), (group.Sequences[0].Published, engine.Status.Steps));
        Assert.Equal(EngineState.Running, await engine.ResumeAsync());
        await group.Completed.WaitAsync(Cancelled);
        Assert.Equal(alone, group.Sequences[0].Bits());
    }

    [Fact]
    public async Task A_pause_that_waits_lets_begun_groups_end_and_holds_new_ones()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        Group begun = engine.Submit(s_request with { MaxTokens = 300, StreamTokens = true });
        await foreach (SequenceChunk _ in begun.ReadAsync(Cancelled)) break;
        Task<PauseResult> pausing = engine.PauseAsync(PauseMode.Wait, "trainer", TimeSpan.FromMinutes(1), Cancelled);
        Group held = engine.Submit(s_request with { Id = "held" });
        await pausing;
        Assert.True(begun.Completed.IsCompleted);
        Assert.Equal(FinishReason.Length, begun.Sequences[0].FinishReason);
        await engine.ResumeAsync();
        await held.Completed.WaitAsync(Cancelled);
        Assert.Equal(FinishReason.Length, held.Sequences[0].FinishReason);
    }

    [Fact]
    public async Task A_pause_ends_with_its_lease()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        await engine.PauseAsync(PauseMode.Abort, "a trainer that died", TimeSpan.FromMilliseconds(150), Cancelled);
        await engine.RunAsync(s_request);
        Assert.Equal(EngineState.Running, engine.Status.State);
    }

    /// <summary>Enough to look for stop strings in.</summary>
    private static string Text(int id) => $"<{id}>";

    private static PieceTokenizer NewTokenizer()
        => new([.. Enumerable.Range(0, 320).Select(id => System.Text.Encoding.UTF8.GetBytes(Text(id)))]);
}
