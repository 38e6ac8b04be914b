using Rollout.Engine;
using Rollout.Server.Generation;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>Runs rollout.v1 requests on an engine: for the service, and for commands with an engine in their own process.</summary>
internal static class EngineCalls
{
    /// <exception cref="InvalidRequestException">Lists everything wrong with the request.</exception>
    /// <exception cref="NoRoomException">Try again later.</exception>
    public static GroupStream Start(RolloutEngine engine, GenerateRequest request)
    {
        RequestConverter converter = new(engine.Tokenizer);
        GroupRequest converted = converter.Convert(request);
        bool promptIsText = request.PromptCase == GenerateRequest.PromptOneofCase.PromptText;
        try
        {
            return GroupStream.Start(engine, converted, promptIsText, request.ReturnText, converter.Problems);
        }
        catch (InvalidRequestException e)
        {
            throw FieldNames.Generate.Rename(e);
        }
    }

    /// <inheritdoc cref="GroupStream.ScoreAsync"/>
    public static async Task<ScoreReply> ScoreAsync(RolloutEngine engine, ScoreRequest request, CancellationToken cancellation)
    {
        RequestConverter converter = new(engine.Tokenizer);
        GroupRequest converted = converter.Convert(request);
        try
        {
            return Replies.Score(await GroupStream.ScoreAsync(engine, converted, converter.Problems, cancellation));
        }
        catch (InvalidRequestException e)
        {
            throw FieldNames.Score.Rename(e);
        }
    }
}
