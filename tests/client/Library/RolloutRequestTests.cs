using Rollout.V1;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class RolloutRequestTests
{
    [Fact]
    public void Every_option_reaches_its_field()
    {
        RolloutRequest request = new(new[] { 1, 2, 3 }, new GenerateOptions
        {
            N = 4,
            Seed = ulong.MaxValue,
            MaxTokens = 5,
            MinTokens = 2,
            Temperature = 0.5f,
            TopK = 7,
            TopP = 0.9f,
            MinP = 0.1f,
            LogitBias = new Dictionary<int, float> { [3] = float.NegativeInfinity },
            StopTokenIds = [8, 9],
            StopStrings = ["\n\n"],
            IgnoreEos = true,
            TopLogProbs = 6,
            PromptLogProbs = true,
            ReturnText = true,
            MaxStaleness = 3,
            CacheSalt = "tenant",
        })
        {
            RequestId = "id",
        };
        Assert.All(typeof(GenerateOptions).GetProperties(), option =>
            Assert.NotEqual(option.GetValue(new GenerateOptions()), option.GetValue(request.Options)));

        GenerateRequest expected = new()
        {
            RequestId = "id",
            PromptIds = new V1.TokenIds { Ids = { 1, 2, 3 } },
            N = 4,
            Seed = ulong.MaxValue,
            Sampling = new V1.SamplingParams
            {
                Temperature = 0.5f,
                TopK = 7,
                TopP = 0.9f,
                MinP = 0.1f,
                LogitBias = { [3] = float.NegativeInfinity },
            },
            Stopping = new V1.StoppingParams
            {
                MaxTokens = 5,
                MinTokens = 2,
                StopTokenIds = { 8, 9 },
                StopStrings = { "\n\n" },
                IgnoreEos = true,
            },
            TopLogprobs = 6,
            PromptLogprobs = true,
            Stream = true,
            ReturnText = true,
            MaxStaleness = 3,
            CacheSalt = "tenant",
        };
        Assert.Equal(expected, request.ToProto(stream: true));
    }

    [Fact]
    public void Absent_stays_absent()
    {
        V1.GenerateRequest request = new RolloutRequest("text").ToProto(stream: false);
        Assert.False(request.HasSeed);
        Assert.False(request.Stopping.HasMaxTokens);
        Assert.False(request.HasMaxStaleness);
        Assert.Equal((1u, 1f, 0u, 0f), (request.N, request.Sampling.TopP, request.Sampling.TopK, request.Sampling.MinP));
        Assert.Equal("text", request.PromptText);
        Assert.Equal(1f, request.Sampling.Temperature);
        Assert.NotEqual("", request.RequestId);
    }

    [Fact]
    public void All_negative_numbers_are_named_at_once()
    {
        RolloutRequest request = new("text", new GenerateOptions
        {
            N = -1,
            MaxTokens = -2,
            TopK = -3,
            StopTokenIds = [-4],
            MinTokens = -5,
            TopLogProbs = -6,
            MaxStaleness = -7,
            LogitBias = new Dictionary<int, float> { [-8] = 1 },
        });
        ArgumentException error = Assert.Throws<ArgumentException>(() => request.ToProto(stream: false));
        Assert.All(
            [
                "N: -1", "MaxTokens: -2", "TopK: -3", "StopTokenIds: -4", "MinTokens: -5", "TopLogProbs: -6", "MaxStaleness: -7",
                "LogitBias: -8",
            ],
            text => Assert.Contains(text, error.Message));
    }

    [Fact]
    public void A_number_that_is_given_as_zero_is_sent_as_zero()
    {
        GenerateOptions options = new() { Seed = 0, MaxTokens = 0, MaxStaleness = 0, Temperature = 0, TopP = 0 };
        V1.GenerateRequest request = new RolloutRequest("text", options).ToProto(stream: false);
        Assert.True(request.HasSeed && request.Stopping.HasMaxTokens && request.HasMaxStaleness);
        Assert.True(request.Sampling.HasTemperature && request.Sampling.HasTopP);
    }

    [Fact]
    public void Requests_have_ids_of_their_own()
    {
        RolloutRequest request = new("text");
        Assert.NotEqual(request.RequestId, new RolloutRequest("text").RequestId);
        Assert.Equal(request.RequestId, request.ToProto(stream: false).RequestId);
    }

    [Fact]
    public void A_negative_prompt_id_is_named()
    {
        ArgumentException error = Assert.Throws<ArgumentException>(() => Prompt.FromIds([5, -7]));
        Assert.Contains("number 1 is -7", error.Message);
    }
}
