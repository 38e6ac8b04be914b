using System.CommandLine;
using System.Text.Json;
using Rollout.Engine;
using Rollout.V1;
using Spectre.Console;
using FinishReason = Rollout.V1.FinishReason;
using SampleChunk = Rollout.V1.SampleChunk;

namespace Rollout.Server.Commands;

/// <summary>`rollout generate`: one prompt, a few samples, here or from a server.</summary>
internal sealed class GenerateCommand
{
    private readonly SourceArguments _source = new();
    private readonly Option<uint[]> _ids = Arguments.Ids("--ids", "The prompt as token ids.");
    private readonly Option<string?> _prompt = new("--prompt") { Description = "Prompt as text; needs a tokenizer.", HelpName = "TEXT" };
    private readonly Option<int?> _n = Arguments.Number("--n", "Samples to draw. Default: 1.", 1);
    private readonly Option<ulong?> _seed = new("--seed") { Description = "Seed of the group. Default: a random one.", HelpName = "N" };
    private readonly Option<int?> _maxTokens = Arguments.Number("--max-tokens", "Most tokens of a sample. Default: 128.", 1);
    private readonly Option<int?> _minTokens = Arguments.Number("--min-tokens", "No end of sequence and no stop before.", 0);
    private readonly Option<float?> _temperature = Arguments.Real("--temperature", "0 is greedy. Default: 1.");
    private readonly Option<int?> _topK = Arguments.Number("--top-k", "Keep the K most probable tokens. 0: all.", 0);
    private readonly Option<float?> _topP = Arguments.Real("--top-p", "Keep the most probable tokens that hold this share of the mass.");
    private readonly Option<float?> _minP = Arguments.Real("--min-p", "Keep tokens with this share of the best one's probability.");
    private readonly Option<string[]> _stop = new("--stop") { Description = "Stop before this text. May be repeated.", HelpName = "TEXT" };
    private readonly Option<uint[]> _stopIds = Arguments.Ids("--stop-ids", "Stop after one of these tokens.");
    private readonly Option<Dictionary<uint, float>> _bias = Arguments.Biases("--logit-bias", "Add to a token's logit. May be repeated.");
    private readonly Option<bool> _ignoreEos = new("--ignore-eos") { Description = "Go on after an end of sequence." };
    private readonly Option<bool> _json = new("--json") { Description = "One line of JSON for other programs." };

    private const uint DefaultMaxTokens = 128;

    public static Command Create() => new GenerateCommand().ToCommand();

    internal Command ToCommand()
    {
        Command command = new("generate", "Draw samples for one prompt.");
        _source.AddTo(command);
        foreach (Option option in (Option[])[_ids, _prompt, _n, _seed, _maxTokens, _minTokens, _temperature, _topK, _topP, _minP, _stop,
            _stopIds, _bias, _ignoreEos, _json])
        {
            command.Add(option);
        }

        command.Validators.Add(result =>
        {
            bool ids = result.GetResult(_ids) is not null;
            bool prompt = result.GetResult(_prompt) is not null;
            if (ids == prompt) result.AddError("exactly one of --ids and --prompt must be given");
        });
        command.SetAction(RunAsync);
        return command;
    }

    private async Task<int> RunAsync(ParseResult result, CancellationToken cancellation)
    {
        GenerateRequest request = Request(result);
        await using IRollouts rollouts = await _source.OpenAsync(result);
        SortedDictionary<uint, SampleChunk> samples = [];
        ulong seed = 0;
        await foreach (GenerateReply reply in rollouts.GenerateAsync(request, cancellation))
        {
            if (reply.HasSeed) seed = reply.Seed;
            foreach (SampleChunk sample in reply.Samples) samples.Add(sample.Index, sample);
        }

        string[] errors = [.. samples.Values.Where(s => s.FinishReason == FinishReason.Error).Select(s => $"sample {s.Index}: {s.Error}")];
        if (errors.Length > 0) throw new FailureException(string.Join("; ", errors));
        if (result.GetValue(_json)) PrintJson(samples.Values, request.ReturnText);
        else PrintReadable(samples.Values, seed, request, rollouts.Tokenizer);
        return ExitCode.Ok;
    }

    internal GenerateRequest Request(ParseResult result)
    {
        GenerateRequest request = new()
        {
            N = (uint)(result.GetValue(_n) ?? 1),
            Sampling = new SamplingParams { TopK = (uint)(result.GetValue(_topK) ?? 0), MinP = result.GetValue(_minP) ?? 0 },
            Stopping = new StoppingParams
            {
                MaxTokens = (uint?)result.GetValue(_maxTokens) ?? DefaultMaxTokens,
                MinTokens = (uint)(result.GetValue(_minTokens) ?? 0),
                IgnoreEos = result.GetValue(_ignoreEos),
            },
        };
        if (result.GetValue(_prompt) is { } text)
        {
            request.PromptText = text;
            request.ReturnText = true;
        }
        else
        {
            request.PromptIds = new TokenIds { Ids = { result.GetValue(_ids)! } };
        }

        if (result.GetValue(_seed) is { } seed) request.Seed = seed;
        if (result.GetValue(_temperature) is { } temperature) request.Sampling.Temperature = temperature;
        if (result.GetValue(_topP) is { } topP) request.Sampling.TopP = topP;
        if (result.GetValue(_bias) is { } biases) request.Sampling.LogitBias.Add(biases);
        if (result.GetValue(_stop) is { } stops) request.Stopping.StopStrings.Add(stops);
        if (result.GetValue(_stopIds) is { } stopIds) request.Stopping.StopTokenIds.Add(stopIds);
        return request;
    }

    private static void PrintJson(IEnumerable<SampleChunk> samples, bool text) => CommandJson.Print(json =>
    {
        json.WriteStartObject();
        json.WriteStartArray("samples");
        foreach (SampleChunk sample in samples)
        {
            json.WriteStartObject();
            json.WriteStartArray("ids");
            foreach (uint id in sample.Ids) json.WriteNumberValue(id);
            json.WriteEndArray();
            json.WriteFloats("logprobs", sample.Logprobs);
            json.WriteFloats("sampling_logprobs", sample.SamplingLogprobs);
            json.WriteString("finish_reason", sample.FinishReason.ToString().ToLowerInvariant());
            if (text) json.WriteString("text", sample.Text);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    });

    private static void PrintReadable(IReadOnlyCollection<SampleChunk> samples, ulong seed, GenerateRequest request, Tokenizer? tokenizer)
    {
        foreach (SampleChunk sample in samples)
        {
            double logProb = sample.Logprobs.Sum(value => (double)value);
            string finish = sample.FinishReason.ToString().ToLowerInvariant();
            AnsiConsole.Write(new Rule(FormattableString.Invariant(
                $"sample {sample.Index}: {sample.Ids.Count} tokens, log-probability {logProb:0.###}, {finish}")).LeftJustified());
            int[] ids = [.. sample.Ids.Select(id => (int)id)];
            if (request.ReturnText) Console.WriteLine(sample.Text);
            else Console.WriteLine(tokenizer?.Decode(ids) ?? string.Join(',', ids));
        }

        AnsiConsole.Write(new Rule($"seed {seed}").LeftJustified());
    }
}
