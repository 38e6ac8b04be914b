using Rollout.Engine;

namespace Rollout.Server.Grpc;

/// <summary>Maps the fields of the engine's requests to their names in rollout.v1, so that problems name what the client wrote.</summary>
internal sealed class FieldNames
{
    private static readonly Dictionary<string, string> s_group = new()
    {
        [nameof(GroupRequest.Id)] = "request_id",
        [nameof(GroupRequest.Prompt)] = "prompt_ids",
        [nameof(GroupRequest.N)] = "n",
        [nameof(GroupRequest.Seed)] = "seed",
        [nameof(GroupRequest.Temperature)] = "sampling.temperature",
        [nameof(GroupRequest.TopK)] = "sampling.top_k",
        [nameof(GroupRequest.TopP)] = "sampling.top_p",
        [nameof(GroupRequest.MinP)] = "sampling.min_p",
        [nameof(GroupRequest.LogitBias)] = "sampling.logit_bias",
        [nameof(GroupRequest.MaxTokens)] = "stopping.max_tokens",
        [nameof(GroupRequest.MinTokens)] = "stopping.min_tokens",
        [nameof(GroupRequest.StopTokenIds)] = "stopping.stop_token_ids",
        [nameof(GroupRequest.StopStrings)] = "stopping.stop_strings",
        [nameof(GroupRequest.IgnoreEos)] = "stopping.ignore_eos",
        [nameof(GroupRequest.TopLogProbs)] = "top_logprobs",
        [nameof(GroupRequest.PromptLogProbs)] = "prompt_logprobs",
        [nameof(GroupRequest.PromptTop)] = "top",
        [nameof(GroupRequest.MaxStaleness)] = "max_staleness",
        [nameof(GroupRequest.CacheSalt)] = "cache_salt",
        [nameof(GroupRequest.StreamTokens)] = "stream",
    };

    private readonly Dictionary<string, string> _names;

    private FieldNames(Dictionary<string, string> names) => _names = names;

    public static FieldNames Generate { get; } = new(s_group);

    public static FieldNames Score { get; } = new(new(s_group) { [nameof(GroupRequest.Prompt)] = "ids" });

    /// <summary>Names of <see cref="Control.EngineControl.PauseAsync"/>'s parameters.</summary>
    public static FieldNames Pause { get; } = new(new() { ["lease"] = "lease_milliseconds", ["owner"] = "owner" });

    /// <summary>Names of <see cref="Control.EngineControl.SleepAsync"/>'s parameters.</summary>
    public static FieldNames Sleep { get; } = new(new() { ["keepWeights"] = "keep_weights" });

    public static FieldNames Update { get; } = new(new()
    {
        [nameof(UpdateManifest.Tensors)] = "manifest",
        [nameof(UpdateManifest.PayloadBytes)] = "payload_bytes",
        [nameof(UpdateManifest.JoinedPayloadBytes)] = "joined_payload_bytes",
        [nameof(UpdateManifest.BaseVersion)] = "base_version",
        [nameof(UpdateManifest.NewVersion)] = "new_version",
    });

    /// <summary>The same problems with rollout.v1's names. Problems that have them already are not changed.</summary>
    public InvalidRequestException Rename(InvalidRequestException exception) => new(Rename(exception.Problems));

    /// <inheritdoc cref="Rename(InvalidRequestException)"/>
    public ProblemList Rename(ProblemList problems) => problems.Rename(Name, NameInMessage);

    private string Name(string field) => _names.GetValueOrDefault(field, field);

    /// <summary>In a message the last part of the path is enough.</summary>
    private string NameInMessage(string field)
    {
        string name = Name(field);
        return name[(name.LastIndexOf('.') + 1)..];
    }
}
