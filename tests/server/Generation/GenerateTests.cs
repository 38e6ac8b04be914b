using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Tests;

public sealed class GenerateTests(SharedServer shared)
{
    private static readonly IReadOnlyList<Golden.Case> s_cases = Golden.Cases("qwen3");

    private readonly ServerProcess _server = shared.Server;

    [Theory]
    [InlineData(0, false)]
    [InlineData(1, true)]
    [InlineData(2, false)]
    public async Task Greedy_equals_the_reference(int k, bool stream)
    {
        Golden.Case golden = s_cases[k];
        List<GenerateReply> replies = await _server.RepliesAsync(
            Calls.Greedy(golden.Prompt, (uint)golden.Tokens.Length, request => request.Stream = stream));
        SampleChunk sample = Assert.Single(Calls.Join(replies));
        Assert.Equal(golden.Tokens, sample.Ids);
        Assert.Equal(FinishReason.Length, sample.FinishReason);
        Assert.All(golden.LogProbs.Zip(sample.Logprobs), pair => Assert.Equal(pair.First, pair.Second, Golden.Tolerance));
        Assert.All(sample.SamplingLogprobs, value => Assert.Equal(0, value));
        Assert.Equal(sample.Ids.Count, sample.Versions.Sum(span => (int)(span.End - span.Start)));
        Assert.All(sample.Versions, span => Assert.Equal(0u, span.Version));
        if (!stream) Assert.Single(replies);
    }

    [Fact]
    public async Task A_sample_is_the_same_alone_in_a_group_streamed_or_packed()
    {
        uint[] prompt = s_cases[1].Prompt;
        List<SampleChunk> group = await _server.SamplesAsync(Calls.Sampled(prompt, 40, seed: 7, n: 8));
        List<SampleChunk> streamed = await _server.SamplesAsync(Calls.Sampled(prompt, 40, seed: 7, n: 8, change: r => r.Stream = true));
        SampleChunk alone = Assert.Single(await _server.SamplesAsync(Calls.Sampled(prompt, 40, seed: 7)));
        Assert.Equal(8, group.Count);
        Assert.Equal(group[0].Ids, alone.Ids);
        Assert.Equal(group[0].Logprobs, alone.Logprobs);
        for (int i = 0; i < group.Count; i++)
        {
            Assert.Equal(group[i].Ids, streamed[i].Ids);
            Assert.Equal(group[i].SamplingLogprobs, streamed[i].SamplingLogprobs);
        }

        // Without truncation or bias at temperature 1 the two log-probabilities are the same number.
        Assert.Equal(alone.Logprobs, alone.SamplingLogprobs);
        Assert.Equal(8, group.Select(sample => string.Join(',', sample.Ids)).Distinct().Count());
    }

    [Fact]
    public async Task What_the_server_chose_is_said_and_can_be_asked_for_again()
    {
        GenerateRequest request = Calls.Sampled(s_cases[0].Prompt, 12, seed: 0);
        request.ClearSeed();
        List<GenerateReply> replies = await _server.RepliesAsync(request);
        Assert.NotEmpty(replies[0].RequestId);
        Assert.True(replies[0].HasSeed);
        List<SampleChunk> again = await _server.SamplesAsync(Calls.Sampled(s_cases[0].Prompt, 12, replies[0].Seed));
        Assert.Equal(replies[0].Samples[0].Ids, again[0].Ids);
        Assert.NotEqual(replies[0].Seed, (await _server.RepliesAsync(request))[0].Seed);
    }

    [Fact]
    public async Task Prompt_log_probabilities_and_alternatives_come_along()
    {
        Golden.Case golden = s_cases[1];
        List<GenerateReply> replies = await _server.RepliesAsync(Calls.Greedy(golden.Prompt, 4, request =>
        {
            request.PromptLogprobs = true;
            request.TopLogprobs = 3;
        }));
        float[] expected = Reference.PromptLogProbs(Golden.Logits("qwen3", 1), golden.Prompt);
        Assert.All(expected.Zip(replies[0].Prompt.Logprobs), pair => Assert.Equal(pair.First, pair.Second, Golden.Tolerance));
        Assert.Equal(golden.Prompt.Length - 1, replies[0].Prompt.Logprobs.Count);
        SampleChunk sample = replies[0].Samples[0];
        Assert.Equal(3u, sample.Top.K);
        for (int i = 0; i < 4; i++)
        {
            Assert.Equal(sample.Ids[i], sample.Top.Ids[3 * i]); // greedy takes the most probable
            Assert.Equal(sample.Logprobs[i], sample.Top.Logprobs[3 * i]);
            Assert.True(sample.Top.Logprobs[3 * i] >= sample.Top.Logprobs[3 * i + 1]);
        }
    }

    [Fact]
    public async Task Score_equals_the_reference()
    {
        Golden.Case golden = s_cases[2];
        ScoreReply reply = await _server.Rollout.ScoreAsync(
            new ScoreRequest { Ids = new TokenIds { Ids = { golden.Prompt } }, Top = 320 }, deadline: Calls.Deadline());
        float[][] logits = Golden.Logits("qwen3", 2);
        Assert.Equal(golden.Prompt, reply.Ids);
        Assert.All(Reference.PromptLogProbs(logits, golden.Prompt).Zip(reply.Logprobs),
            pair => Assert.Equal(pair.First, pair.Second, Golden.Tolerance));
        Assert.Equal(golden.Prompt.Length * 320, reply.Top.Ids.Count);
        for (int row = 0; row < golden.Prompt.Length; row++)
        {
            float[] expected = Reference.LogSoftmax(logits[row]);
            for (int i = 0; i < 320; i++)
                Assert.Equal(expected[reply.Top.Ids[row * 320 + i]], reply.Top.Logprobs[row * 320 + i], Golden.Tolerance);
        }
    }

    [Fact]
    public async Task Text_goes_in_and_comes_out_and_ends_before_a_stop_string()
    {
        GenerateRequest request = Calls.Sampled([], 200, seed: 3, change: r =>
        {
            r.PromptText = "héllo";
            r.ReturnText = true;
        });
        List<GenerateReply> replies = await _server.RepliesAsync(request);
        Assert.Equal([(uint)'h', 0xC3, 0xA9, 'l', 'l', 'o'], replies[0].Prompt.Ids);
        string text = replies[0].Samples[0].Text;
        Assert.NotEmpty(text);

        // A stop string that spans tokens, from the middle of what is known to come.
        int from = Enumerable.Range(20, text.Length - 24).First(i => text.AsSpan(i, 3).IndexOfAnyExceptInRange(' ', '~') < 0);
        string stop = text.Substring(from, 3);
        request.Stopping.StopStrings.Add(stop);
        foreach (bool stream in (bool[])[false, true])
        {
            request.Stream = stream;
            SampleChunk stopped = Assert.Single(await _server.SamplesAsync(request));
            Assert.Equal(FinishReason.Stop, stopped.FinishReason);
            Assert.Equal(text[..text.IndexOf(stop, StringComparison.Ordinal)], stopped.Text);
            Assert.Equal(replies[0].Samples[0].Ids.Take(stopped.Ids.Count), stopped.Ids);
        }
    }

    [Fact]
    public async Task Many_groups_on_one_call_each_as_if_alone()
    {
        const int Groups = 120;
        GenerateRequest Request(int i) => Calls.Sampled(s_cases[i % 3].Prompt, 8, (ulong)i, n: 2, change: r => r.RequestId = $"batch-{i}");
        using AsyncDuplexStreamingCall<GenerateRequest, GenerateReply> call = _server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        Task<List<GenerateReply>> reading = call.ResponseStream.ReadAllAsync().ToListAsync().AsTask();
        for (int i = 0; i < Groups; i++)
        {
            await call.RequestStream.WriteAsync(Request(i));
            if (i % 10 == 5)
            {
                await call.RequestStream.WriteAsync(Calls.Greedy([999], 8, r => r.RequestId = $"bad-{i}"));
            }
        }

        await call.RequestStream.CompleteAsync();
        ILookup<string, GenerateReply> replies = (await reading).ToLookup(reply => reply.RequestId);
        Assert.Equal(Groups + Groups / 10, replies.Count);
        Assert.All(replies.Where(group => group.Key.StartsWith("bad", StringComparison.Ordinal)), group =>
        {
            Refusal refusal = Assert.Single(group).Refused;
            Assert.Equal((int)StatusCode.InvalidArgument, refusal.Code);
            Assert.Contains("prompt_ids[0]", refusal.Message, StringComparison.Ordinal);
        });
        foreach (int i in (int[])[0, 1, 2, Groups - 1])
        {
            List<SampleChunk> alone = await _server.SamplesAsync(Request(i));
            List<SampleChunk> batched = Calls.Join(replies[$"batch-{i}"]);
            Assert.Equal(alone.Select(sample => sample.Ids), batched.Select(sample => sample.Ids));
        }
    }
}
