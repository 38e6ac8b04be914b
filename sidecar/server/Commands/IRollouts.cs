using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Commands;

/// <summary>The source of a command's samples and scores: an engine in this process, or a server.</summary>
internal interface IRollouts : IAsyncDisposable
{
    /// <summary>Decodes ids to text for display; null where there is no tokenizer.</summary>
    Tokenizer? Tokenizer { get; }

    IAsyncEnumerable<GenerateReply> GenerateAsync(GenerateRequest request, CancellationToken cancellation);

    Task<ScoreReply> ScoreAsync(ScoreRequest request, CancellationToken cancellation);
}
