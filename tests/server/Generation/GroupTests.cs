using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Replies contain all of a group, once, at the right positions, for any division of the tokens into replies.</summary>
public sealed class GroupTests
{
    private static readonly uint[] s_prompt = [.. Enumerable.Range(0, 40).Select(i => (uint)i + 3)];

    [Theory]
    [InlineData(UpdatePolicy.Keep)]
    [InlineData(UpdatePolicy.Recompute)]
    public async Task A_streamed_sample_that_new_weights_meet_half_way_has_everything_for_every_token(UpdatePolicy policy)
    {
        await using HeldServer server = await HeldServer.StartAsync();
        GenerateRequest request = Calls.Greedy(s_prompt, 30, r => (r.Stream, r.TopLogprobs, r.N) = (true, 3, 2));
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(request);
        await server.CommitAsync(Payload.Reversed("qwen3"), 0, 7, begin => begin.Policy = policy);
        await server.Control.ResumeAsync(new ResumeRequest());
        foreach (SampleChunk sample in await begun)
        {
            Assert.Equal(30, sample.Ids.Count);
            Assert.Equal(30, sample.SamplingLogprobs.Count);
            Assert.All(sample.SamplingLogprobs, value => Assert.Equal(0, value)); // greedy
            Assert.Equal((3u, 90, 90), (sample.Top.K, sample.Top.Ids.Count, sample.Top.Logprobs.Count));
            for (int i = 0; i < 30; i++)
            {
                Assert.Equal((sample.Ids[i], sample.Logprobs[i]), (sample.Top.Ids[3 * i], sample.Top.Logprobs[3 * i]));
                Assert.True(sample.Top.Logprobs[3 * i] >= sample.Top.Logprobs[(3 * i) + 1]);
            }

            uint end = 0;
            foreach (VersionSpan span in sample.Versions)
            {
                Assert.Equal((end, span.Start < 4 ? 0ul : 7ul), (span.Start, span.Version)); // four tokens had come when it was held
                Assert.True(span.End > span.Start);
                end = span.End;
            }

            Assert.Equal(30u, end);
            Assert.Contains(sample.Versions, span => span.End == 4);
            Assert.Equal(policy == UpdatePolicy.Keep ? 0ul : 7ul, sample.OldestKvVersion);
        }
    }

    [Fact]
    public async Task The_first_reply_introduces_the_group_and_no_other_does()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        GenerateRequest request = Calls.Sampled(s_prompt, 60, seed: 5, n: 3, change: r => r.Stream = true);
        List<GenerateReply> replies = await server.RepliesAsync(request);
        Assert.All(replies, reply => Assert.NotEmpty(reply.RequestId));
        Assert.Single(replies.Select(reply => reply.RequestId).Distinct());
        Assert.Equal((true, 5ul), (replies[0].HasSeed, replies[0].Seed));
        Assert.Empty(replies[0].Prompt.Ids); // it was not text
        Assert.Empty(replies[0].Prompt.Logprobs);
        Assert.All(replies.Skip(1), reply => Assert.Equal((false, null), (reply.HasSeed, reply.Prompt)));
        Assert.All(replies.SelectMany(reply => reply.Samples), chunk => Assert.Empty(chunk.Text));
        request.Stream = false;
        replies = await server.RepliesAsync(request);
        Assert.Equal(3, replies.Count);
        Assert.Equal(1, replies.Count(reply => reply.Prompt is not null));
    }

    [Fact]
    public async Task Cached_tokens_are_counted_by_salt_in_whole_blocks()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        async Task<uint> CachedAsync(int prompt, string salt, Action<GenerateRequest>? change = null)
        {
            GenerateRequest request = Calls.Greedy(s_prompt[..prompt], 1, r => r.CacheSalt = salt);
            change?.Invoke(request);
            return (await server.RepliesAsync(request))[0].Prompt.CachedTokens;
        }

        Assert.Equal(0u, await CachedAsync(40, "a"));
        Assert.Equal(32u, await CachedAsync(40, "a"));
        Assert.Equal(16u, await CachedAsync(32, "a")); // its last token has to be computed
        Assert.Equal(32u, await CachedAsync(33, "a"));
        Assert.Equal(0u, await CachedAsync(40, "a", r => r.PromptLogprobs = true));
        Assert.Equal(0u, await CachedAsync(40, "b"));
        Assert.Equal(0u, await CachedAsync(40, ""));
        await server.Rollout.ScoreAsync(new ScoreRequest { Ids = new TokenIds { Ids = { s_prompt } }, CacheSalt = "scored" });
        Assert.Equal(0u, await CachedAsync(40, "not scored"));
        Assert.Equal(32u, await CachedAsync(40, "scored"));
        await server.CommitAsync(Payload.Reversed("qwen3"), 0, 1);
        Assert.Equal(0u, await CachedAsync(40, "a"));
    }

    [Fact]
    public async Task A_group_that_ends_before_its_prompt_was_computed_has_no_log_probabilities_of_it()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        await server.Control.PauseAsync(new PauseRequest { Mode = PauseMode.Keep, LeaseMilliseconds = 60_000 });
        Task<List<GenerateReply>> waits = server.RepliesAsync(Calls.Greedy(s_prompt, 5, r => (r.PromptLogprobs, r.Stream) = (true, true)));
        await server.StatusAsync(status => status.Waiting == 1);
        await server.Rollout.AbortAsync(new AbortRequest { All = true });
        GenerateReply reply = Assert.Single(await waits);
        Assert.Empty(reply.Prompt.Logprobs);
        Assert.Equal((0, FinishReason.Abort), (reply.Samples[0].Ids.Count, reply.Samples[0].FinishReason));
    }

    /// <summary>The token drawn last ends a stop string that min_tokens lets pass; then the sample ends for another reason.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task Text_of_an_aborted_sample_is_all_its_text(bool stream)
    {
        await using HeldServer server = await HeldServer.StartAsync();
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(Calls.Greedy(s_prompt, 100, r =>
        {
            (r.ReturnText, r.Stream) = (true, stream);
            r.Sampling.LogitBias['a'] = 1000;
            r.Stopping.StopStrings.Add("aa");
            r.Stopping.MinTokens = 50;
        }));
        await server.Rollout.AbortAsync(new AbortRequest { All = true });
        SampleChunk sample = Assert.Single(await begun);
        Assert.Equal(FinishReason.Abort, sample.FinishReason);
        Assert.Equal((4, "aaaa"), (sample.Ids.Count, sample.Text));
    }

    [Fact]
    public async Task Every_way_to_end_has_its_reason()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        async Task EndsAsync(FinishReason reason, int tokens, string text, Action<GenerateRequest> change)
        {
            foreach (bool stream in (bool[])[false, true])
            {
                SampleChunk sample = Assert.Single(await server.SamplesAsync(Calls.Greedy(s_prompt, 6, r =>
                {
                    r.Sampling.LogitBias['a'] = 1000;
                    (r.ReturnText, r.Stream) = (true, stream);
                    change(r);
                })));
                Assert.Equal((reason, tokens, text), (sample.FinishReason, sample.Ids.Count, sample.Text));
            }
        }

        await EndsAsync(FinishReason.Length, 6, "aaaaaa", _ => { });
        await EndsAsync(FinishReason.Stop, 1, "a", r => r.Stopping.StopTokenIds.Add('a'));
        await EndsAsync(FinishReason.Stop, 3, "", r => r.Stopping.StopStrings.Add("aaa"));
        await EndsAsync(FinishReason.Stop, 5, "aa", r =>
        {
            r.Stopping.StopStrings.Add("aaa");
            r.Stopping.MinTokens = 5;
        });
    }
}
