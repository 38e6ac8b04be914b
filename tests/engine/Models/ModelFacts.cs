namespace Rollout.Engine.Tests;

/// <summary>What all layers of a model have in common, as those of the goldens do.</summary>
internal static class ModelFacts
{
    extension(ModelSpec model)
    {
        public AttentionSpec Attention => model.Layers[0].Attention;

        public GatedMlpSpec Mlp => model.Layers[0].FeedForward;
    }
}
